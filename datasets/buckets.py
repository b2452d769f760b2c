"""Aspect buckets: the sizes that pictures are brought to, all of about one area, so that a batch has one shape."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from scumble.configs.errors import Refused

from .reading.images import Size

MAX_ASPECT = 3.0


@dataclass(frozen=True)
class Buckets:
    """The table for one area budget. `sizes` stand from the square to the longest; sides are in whole steps.

    Without `upscale` a picture smaller than its place in the table gets a bucket of its own size, in whole steps;
    only one that is under a single step somewhere is enlarged, since no smaller bucket can be.
    """

    resolution_px: int
    step_px: int
    sizes: tuple[Size, ...]
    least_px: int
    most_px: int
    upscale: bool = True

    def of(self, picture: Size) -> Size:
        """The bucket of a picture: that of the nearest aspect, which is that of which the least is cut."""
        size = nearest_bucket(picture, self.sizes)
        if self.upscale or (size.width <= picture.width and size.height <= picture.height):
            return size
        shrink = min(1.0, self.resolution_px / math.sqrt(picture.pixels))
        sides = [self._whole(side * shrink) for side in (picture.width, picture.height)]
        longest = self._whole(min(sides) * MAX_ASPECT)
        return Size(min(sides[0], longest), min(sides[1], longest))

    def _whole(self, side: float) -> int:
        """The side in whole steps, rounded down, within the limits."""
        side = min(self.most_px, max(self.least_px, math.floor(side + 1e-6)))
        return side // self.step_px * self.step_px


def make_buckets(
    resolution_px: int, step_px: int, least_px: int = 0, most_px: int = 0, upscale: bool = True
) -> Buckets:
    """The table of sizes of at most `resolution_px`² pixels. Sides lie from `least_px` to `most_px` (0: no limit).

    Raises `Refused` naming the option that leaves no size.
    """
    least = max(1, math.ceil(least_px / step_px)) * step_px
    most = (most_px or math.ceil(resolution_px * MAX_ASPECT**0.5)) // step_px * step_px
    sizes = [
        size
        for size in bucket_sizes(resolution_px, step_px, most)
        if min(size.width, size.height) >= least and max(size.width, size.height) <= most
    ]
    if not sizes:
        if resolution_px < step_px:
            raise Refused(f"--resolution {resolution_px}: sides are in steps of {step_px}, so it must be at least that")
        limit = f"--min-bucket-reso {least_px}" if least_px else f"--max-bucket-reso {most_px}"
        raise Refused(f"{limit}: leaves no size for --resolution {resolution_px} in steps of {step_px} px")
    return Buckets(resolution_px, step_px, tuple(sizes), least, most, upscale)


def bucket_sizes(resolution_px: int, step_px: int, most_px: int = 0) -> list[Size]:
    """Sizes of at most `resolution_px`² pixels with sides in whole steps and aspect up to 3:1, the square first."""
    area = resolution_px**2
    most_px = most_px or int(resolution_px * MAX_ASPECT**0.5)
    widths = range(step_px, min(most_px, int(resolution_px * MAX_ASPECT**0.5)) + 1, step_px)
    pairs = [(width, min(area // width, most_px) // step_px * step_px) for width in widths]
    sizes = {
        Size(*pair)
        for pair in chain(pairs, ((height, width) for width, height in pairs))
        if min(pair) > 0 and max(pair) <= MAX_ASPECT * min(pair)
    }
    return sorted(sizes, key=lambda size: (abs(math.log(size.width / size.height)), -size.pixels, size.width))


def nearest_bucket(picture: Size, sizes: Sequence[Size]) -> Size:
    """The bucket whose aspect is nearest (in log), the larger of two alike."""

    def distance(size: Size) -> tuple[float, int]:
        aspect = abs(math.log(size.width / size.height) - math.log(picture.width / picture.height))
        return round(aspect, 6), -size.pixels

    return min(sizes, key=distance)
