"""The images that captioners receive: a path, and pixels that are decoded on first use."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from scumble.datasets.reading.images import read_rgb


@dataclass(frozen=True)
class ImageFile:
    """One image file."""

    path: Path

    @cached_property
    def pixels(self) -> Image.Image:
        """The image in RGB, upright. Raises `Refused` if the file cannot be read."""
        return read_rgb(self.path)


def shrink(pixels: Image.Image, max_side_px: int) -> Image.Image:
    """Scale an image down so that its longer side is at most `max_side_px`; a smaller image is returned as it is."""
    if max(pixels.size) <= max_side_px:
        return pixels
    smaller = pixels.copy()
    smaller.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
    return smaller


def split_on_oom(images: Sequence[ImageFile], generate: Callable[[Sequence[ImageFile]], list[str]]) -> list[str]:
    """The captions that `generate` returns; a batch that runs out of device memory is split in half and retried."""
    from torch import OutOfMemoryError

    try:
        return generate(images)
    except OutOfMemoryError:
        if len(images) == 1:
            raise
    middle = len(images) // 2  # outside the handler, where the exception keeps the memory of the failed batch alive
    return split_on_oom(images[:middle], generate) + split_on_oom(images[middle:], generate)
