"""Aspect buckets: the sizes that pictures are brought to, all of about one area, so that a batch has one shape."""

import math
from itertools import chain

from .images import Size

MAX_ASPECT = 3.0


def bucket_sizes(resolution_px: int, step_px: int) -> list[Size]:
    """Sizes of at most `resolution_px`² pixels with sides in whole steps and aspect up to 3:1, the square first."""
    area = resolution_px**2
    widths = range(step_px, int(resolution_px * MAX_ASPECT**0.5) + 1, step_px)
    pairs = [(width, area // width // step_px * step_px) for width in widths]
    sizes = {
        Size(*pair)
        for pair in chain(pairs, ((height, width) for width, height in pairs))
        if min(pair) > 0 and max(pair) <= MAX_ASPECT * min(pair)
    }
    return sorted(sizes, key=lambda size: (abs(math.log(size.width / size.height)), size.width))


def nearest_bucket(picture: Size, sizes: list[Size]) -> Size:
    """The bucket whose aspect is nearest (in log), the larger of two alike."""

    def distance(size: Size) -> tuple[float, int]:
        aspect = abs(math.log(size.width / size.height) - math.log(picture.width / picture.height))
        return round(aspect, 6), -size.width * size.height

    return min(sizes, key=distance)
