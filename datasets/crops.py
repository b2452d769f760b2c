"""Chooses the crops of each image: at each resolution, in its bucket, with random and mirrored variants."""

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
    """An image at one resolution. Each training sample uses one of its crops, which all have the same size."""

    example: Example
    crops: tuple[Crop, ...]

    @property
    def size(self) -> Size:
        return self.crops[0].target


def tables(data: Data, resolution_px: int, step_px: int) -> list[Buckets]:
    """Return the buckets for each requested resolution. Raises `Refused` if the limits leave no bucket for one."""
    return [
        make_buckets(side_px, step_px, data.min_bucket_reso, data.max_bucket_reso, data.bucket_upscale)
        for side_px in dict.fromkeys([resolution_px, *data.more_resolutions])
    ]


def crop_examples(
    examples: Sequence[Example], buckets: Sequence[Buckets], data: Data, seed: int
) -> list[CroppedExample]:
    """Crop every image at every resolution, but only once if two resolutions give the same size.

    Raises `Refused` naming an image that cannot be read, or OpenCV if it is needed but not installed.
    """
    return [cropped for example in examples for cropped in _cropped_examples(example, buckets, data, seed)]


def _cropped_examples(example: Example, buckets: Sequence[Buckets], data: Data, seed: int) -> Iterator[CroppedExample]:
    original, data = read_size(example.image), with_folder_rules(data, example.rules)
    weights = None
    if data.crop in ("focus", "faces"):
        weights = focus_map(example.image, example.mask, data.crop == "faces")
    for size in dict.fromkeys(table.bucket_of(original) for table in buckets):
        if weights is not None:
            shares = [best_share(weights, original, size)]
        elif data.crop == "random":
            shares = stratified_shares(data.crops, f"{seed}/{example.image.name}/crop")
        else:
            shares = [0.5]
        crops = dict.fromkeys(crop_at(original, size, share) for share in shares)
        if data.random_flip:
            crops = dict.fromkeys(variant for crop in crops for variant in (crop, replace(crop, mirrored=True)))
        yield CroppedExample(example, tuple(crops))


def stratified_shares(count: int, seed: str) -> list[float]:
    """Return `count` values from 0 to 1, one at random in each of `count` equal intervals (stratified sampling)."""
    rng = random.Random(seed)
    return [(part + rng.random()) / count for part in range(count)]
