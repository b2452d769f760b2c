"""Terminal output of `scumble caption`: progress while a folder is captioned, and a summary afterwards."""

import shlex
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from scumble.configs.errors import printable
from scumble.configs.progress import progress_bar
from scumble.configs.words import counted

from .recipe import CaptionOutcome

NUM_EXAMPLES = 3  # captions printed at the start, so that an unsuitable captioner is noticed early
MAX_LISTED = 10  # skipped files listed individually


@contextmanager
def caption_progress(show_all: bool) -> Generator[Callable[[int, int, Path, str], None]]:
    """Yield a function to call with each caption. It shows the latest in a bar and prints the first few, or all."""
    num_shown = 0
    with progress_bar("captioning") as advance:

        def report(done: int, total: int, image: Path, caption: str) -> None:
            nonlocal num_shown
            line = printable(f"{image.name}: {' / '.join(caption.splitlines())}")
            advance(done, total, line[:60])
            if show_all or num_shown < NUM_EXAMPLES:
                print(f"  {line}")
                num_shown += 1

        yield report


def describe_outcome(outcome: CaptionOutcome, source: Path, captioner: str, dry_run: bool) -> str:
    """A summary of the result, one line per fact."""
    lines = [f"{'would write' if dry_run else 'wrote'} {counted(len(outcome.written), 'caption')} with {captioner}"]
    if outcome.kept:
        lines.append(f"  {counted(len(outcome.kept), 'existing caption')} kept")
    if outcome.kept_manual:
        kept = counted(len(outcome.kept_manual), "manual caption")
        lines.append(f"  {kept} kept; --overwrite also replaces manual captions")
    if outcome.empty:
        images = counted(len(outcome.empty), "image")
        lines.append(f"  {images} not captioned: {captioner} returned no text for {short_list(outcome.empty)}")
    for skipped, count in Counter(map(str, outcome.skipped[:MAX_LISTED])).items():
        lines.append(f"  skipped: {skipped}" + f" ({count} times)" * (count > 1))
    if len(outcome.skipped) > MAX_LISTED:
        lines.append(f"  {len(outcome.skipped) - MAX_LISTED} more skipped")
    for words in outcome.lost_class_words:
        lines.append(f"  some captions now lack the class words {words!r} of the folder name; --trigger adds them")
    if outcome.written and not dry_run:
        lines.append(f"  to undo: `scumble caption {shlex.quote(str(source))} --undo`")
    return "\n".join(lines)


def short_list(paths: list[Path]) -> str:
    """The names of the first three files."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(path.name for path in paths[:3]) + more
