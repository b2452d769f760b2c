"""What a person sees while a folder is captioned, and what became of it afterwards."""

import shlex
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from scumble.configs.errors import printable
from scumble.configs.progress import progress_bar
from scumble.configs.words import counted

from .recipe import CaptionOutcome

EXAMPLES = 3  # captions that are shown so that a wrong captioner is noticed at once
NAMED = 10  # files named one by one


@contextmanager
def caption_progress(show_all: bool) -> Generator[Callable[[int, int, Path, str], None]]:
    """Yield a function that is called with each caption: a bar shows the latest; the first few, or all, are printed."""
    num_shown = 0
    with progress_bar("captioning") as advance:

        def tell(done: int, total: int, image: Path, caption: str) -> None:
            nonlocal num_shown
            line = printable(f"{image.name}: {' / '.join(caption.splitlines())}")
            advance(done, total, line[:60])
            if show_all or num_shown < EXAMPLES:
                print(f"  {line}")
                num_shown += 1

        yield tell


def describe_outcome(outcome: CaptionOutcome, source: Path, captioner: str, dry_run: bool) -> str:
    """What became of the pictures, a line for each thing to know."""
    lines = [f"{'would write' if dry_run else 'wrote'} {counted(len(outcome.written), 'caption')} by {captioner}"]
    if outcome.kept:
        lines.append(f"  {len(outcome.kept)} kept as they are")
    if outcome.by_hand:
        lines.append(f"  {len(outcome.by_hand)} kept because a person wrote them; --overwrite replaces those too")
    if outcome.silent:
        lines.append(f"  {len(outcome.silent)} got none: {captioner} has no word for {named(outcome.silent)}")
    for lost, count in Counter(map(str, outcome.lost[:NAMED])).items():
        lines.append(f"  left out: {lost}" + f" ({count} times)" * (count > 1))
    if len(outcome.lost) > NAMED:
        lines.append(f"  and {len(outcome.lost) - NAMED} more left out")
    for words in outcome.unheard:
        lines.append(
            f"  the folder's words {words!r} were the caption so far and are in none of these: --trigger adds them"
        )
    if outcome.written and not dry_run:
        lines.append(f"  `scumble caption {shlex.quote(str(source))} --undo` takes them back")
    return "\n".join(lines)


def named(paths: list[Path]) -> str:
    """The first few names."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(path.name for path in paths[:3]) + more
