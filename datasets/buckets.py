"""Aspect-ratio buckets: the sizes that images are resized and cropped to, all with about the same area."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from scumble.configs.errors import Refused

from .reading.images import Size

MAX_ASPECT = 3.0


@dataclass(frozen=True)
class Buckets:
    """The buckets for one area. `sizes` are sorted from the square to the most elongated, in multiples of `step_px`.

    Without `upscale`, an image smaller than its bucket gets a bucket of its own size, rounded down to multiples of
    `step_px`. It is only upscaled if a side is below `step_px`, since there is no smaller bucket.
    """

    resolution_px: int
    step_px: int
    sizes: tuple[Size, ...]
    min_px: int
    max_px: int
    upscale: bool = True

    def bucket_of(self, image: Size) -> Size:
        """Return the bucket with the nearest aspect ratio, which is the one that crops the least."""
        size = nearest_bucket(image, self.sizes)
        if self.upscale or (size.width <= image.width and size.height <= image.height):
            return size
        shrink = min(1.0, self.resolution_px / math.sqrt(image.pixels))
        sides = [self._rounded(side * shrink) for side in (image.width, image.height)]
        longest = self._rounded(min(sides) * MAX_ASPECT)
        return Size(min(sides[0], longest), min(sides[1], longest))

    def _rounded(self, side: float) -> int:
        """Round a side down to a multiple of `step_px`, within the limits."""
        side = min(self.max_px, max(self.min_px, math.floor(side + 1e-6)))
        return side // self.step_px * self.step_px


def make_buckets(resolution_px: int, step_px: int, min_px: int = 0, max_px: int = 0, upscale: bool = True) -> Buckets:
    """Return the buckets of at most `resolution_px`² pixels, with sides from `min_px` to `max_px` (0: no limit).

    Raises `Refused` naming the option that leaves no bucket.
    """
    least = max(1, math.ceil(min_px / step_px)) * step_px
    most = (max_px or math.ceil(resolution_px * MAX_ASPECT**0.5)) // step_px * step_px
    sizes = [
        size
        for size in bucket_sizes(resolution_px, step_px, most)
        if min(size.width, size.height) >= least and max(size.width, size.height) <= most
    ]
    if not sizes:
        if resolution_px < step_px:
            raise Refused(f"--resolution {resolution_px}: must be at least the bucket step of {step_px} px")
        limit = f"--min-bucket-reso {min_px}" if min_px else f"--max-bucket-reso {max_px}"
        raise Refused(f"{limit}: leaves no bucket for --resolution {resolution_px} with a bucket step of {step_px} px")
    return Buckets(resolution_px, step_px, tuple(sizes), least, most, upscale)


def bucket_sizes(resolution_px: int, step_px: int, max_px: int = 0) -> list[Size]:
    """Return the sizes of at most `resolution_px`² pixels in multiples of `step_px`, up to 3:1, the square first."""
    area = resolution_px**2
    max_px = max_px or int(resolution_px * MAX_ASPECT**0.5)
    widths = range(step_px, min(max_px, int(resolution_px * MAX_ASPECT**0.5)) + 1, step_px)
    pairs = [(width, min(area // width, max_px) // step_px * step_px) for width in widths]
    sizes = {
        Size(*pair)
        for pair in chain(pairs, ((height, width) for width, height in pairs))
        if min(pair) > 0 and max(pair) <= MAX_ASPECT * min(pair)
    }
    return sorted(sizes, key=lambda size: (abs(math.log(size.width / size.height)), -size.pixels, size.width))


def nearest_bucket(image: Size, sizes: Sequence[Size]) -> Size:
    """Return the bucket with the nearest aspect ratio (in log space), the larger one on a tie."""

    def distance(size: Size) -> tuple[float, int]:
        aspect = abs(math.log(size.width / size.height) - math.log(image.width / image.height))
        return round(aspect, 6), -size.pixels

    return min(sizes, key=distance)
