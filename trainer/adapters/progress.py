"""A bar for work that takes minutes on large files, where a person looks on."""

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def with_bar(items: Sequence[Item], words: str) -> Iterator[Item]:
    """The items one by one; a terminal shows `words` and how many are done, and nothing of it stays."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, words, console=Console(stderr=True), transient=True)
