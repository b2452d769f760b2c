"""A bar for work that takes minutes on large files, where a person looks on."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def with_bar(items: Iterable[Item], words: str, count: int) -> Iterator[Item]:
    """The `count` items one by one; a terminal shows `words` and how many are done, and nothing of it stays."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, words, count, console=Console(stderr=True), transient=True)
