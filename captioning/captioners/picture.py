"""A picture as captioners get it: where it is, and its pixels once they are asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from scumble.datasets.reading.images import read_rgb


@dataclass(frozen=True)
class Picture:
    """One picture file."""

    path: Path

    @cached_property
    def pixels(self) -> Image.Image:
        """The upright picture in RGB. Raises `Refused` where the file cannot be read."""
        return read_rgb(self.path)


def within(pixels: Image.Image, side_px: int) -> Image.Image:
    """The picture made smaller where its longer side is above `side_px`, else itself."""
    if max(pixels.size) <= side_px:
        return pixels
    smaller = pixels.copy()
    smaller.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    return smaller


def in_halves(pictures: Sequence[Picture], describe: Callable[[Sequence[Picture]], list[str]]) -> list[str]:
    """What `describe` says of the pictures, in ever smaller batches while the device's memory does not hold them."""
    from torch import OutOfMemoryError

    try:
        return describe(pictures)
    except OutOfMemoryError:
        if len(pictures) == 1:
            raise
    middle = len(pictures) // 2  # outside of the handler, which holds on to the memory of what failed
    return in_halves(pictures[:middle], describe) + in_halves(pictures[middle:], describe)
