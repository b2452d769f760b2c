"""Progress bars for people, shown only on a terminal and removed when the work is done."""

import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
Advance = Callable[..., None]


@contextmanager
def progress_bar(description: str, hidden: bool = False) -> Generator[Advance]:
    """Yield `advance(done, total, note="")`, which updates the bar; it appears with the first call.

    What is printed meanwhile appears above the bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn(description, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console, transient=True, disable=hidden or not sys.stderr.isatty(),
        redirect_stdout=sys.stdout.isatty(),
    )  # fmt: skip
    task: Any = None

    def advance(done: int, total: int, note: str = "") -> None:
        nonlocal task
        if task is None:
            bar.start()
            task = bar.add_task("", total=total, note=note)
        bar.update(task, completed=done, note=note)

    try:
        yield advance
    finally:
        bar.stop()


def tracked(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """The `total` items one by one, counted by a bar."""
    with progress_bar(description) as advance:
        for done, item in enumerate(items):
            advance(done, total)
            yield item
