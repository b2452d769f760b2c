"""What a person sees while a folder is captioned, and what became of it afterwards."""

import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from scumble.configs.words import counted

from .recipe import Outcome

EXAMPLES = 3  # captions that are shown so that a wrong captioner is noticed at once
NAMED = 10  # files named one by one


class Progress:
    """A bar with the latest caption; the first few captions stay, or `everything`."""

    def __init__(self, everything: bool):
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.everything, self.shown = everything, 0
        self.bar = Bar(
            TextColumn("captioning"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[caption]}", table_column=None, markup=False),
            transient=True, disable=not sys.stdout.isatty(),
        )  # fmt: skip
        self.task: Any = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *trouble: object) -> None:
        self.bar.stop()

    def tell(self, done: int, total: int, picture: Path, caption: str) -> None:
        if self.task is None:
            self.bar.start()
            self.task = self.bar.add_task("", total=total, caption="")
        one_line = " / ".join(caption.splitlines())
        self.bar.update(self.task, completed=done, caption=f"{picture.name}: {one_line}"[:60])
        if self.everything or self.shown < EXAMPLES:
            self.bar.console.print(f"  {picture.name}: {one_line}", soft_wrap=True, markup=False, highlight=False)
            self.shown += 1


def told(outcome: Outcome, source: Path, captioner: str, dry_run: bool) -> str:
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
