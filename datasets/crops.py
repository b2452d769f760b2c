"""Which crops of which pictures training sees: each picture at each resolution, in its bucket, in its variants."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from scumble.configs.options import Data

from .buckets import Buckets, make_buckets
from .captions import with_folder_rules
from .focus import best_share, focus_map
from .reading.folder import Example
from .reading.images import Crop, Size, crop_at, read_size


@dataclass(frozen=True)
class CroppedExample:
    """A picture at one resolution. In each look one of its crops, which share one size, is drawn."""

    example: Example
    crops: tuple[Crop, ...]

    @property
    def size(self) -> Size:
        return self.crops[0].target


def tables(data: Data, resolution_px: int, step_px: int) -> list[Buckets]:
    """A table of buckets for each resolution that is asked for. Raises `Refused` where one leaves no size."""
    wanted = dict.fromkeys([resolution_px, *data.more_resolutions])
    return [
        make_buckets(one, step_px, data.min_bucket_reso, data.max_bucket_reso, data.bucket_upscale) for one in wanted
    ]


def crop_examples(
    examples: Sequence[Example], buckets: Sequence[Buckets], data: Data, seed: int
) -> list[CroppedExample]:
    """Every picture at every resolution, but once only where two resolutions give it one size.

    Raises `Refused` naming a picture that cannot be read, or OpenCV where it is needed and missing.
    """
    return [view for example in examples for view in _views(example, buckets, data, seed)]


def _views(example: Example, buckets: Sequence[Buckets], data: Data, seed: int) -> Iterator[CroppedExample]:
    original, data = read_size(example.image), with_folder_rules(data, example.rules)
    interest = None
    if data.crop in ("focus", "faces"):
        interest = focus_map(example.image, example.mask, data.crop == "faces")
    for size in dict.fromkeys(table.of(original) for table in buckets):
        if interest is not None:
            shares = [best_share(interest, original, size)]
        elif data.crop == "random":
            shares = spread(data.crops, f"{seed}/{example.image.name}/crop")
        else:
            shares = [0.5]
        crops = dict.fromkeys(crop_at(original, size, share) for share in shares)
        if data.random_flip:
            crops = dict.fromkeys(variant for crop in crops for variant in (crop, replace(crop, mirrored=True)))
        yield CroppedExample(example, tuple(crops))


def spread(number: int, seed: str) -> list[float]:
    """`number` places from 0 to 1, one at random in each equal part, so that few of them still reach everywhere."""
    draw = random.Random(seed)
    return [(part + draw.random()) / number for part in range(number)]
