"""Measures the cost of bucketing: how much of each image is cropped off, and which images are upscaled."""

from collections.abc import Sequence
from dataclasses import dataclass

from .crops import CroppedExample
from .reading.images import Size

LITTLE = 0.01
MUCH = 0.2  # share of an image's pixels; a crop of more than this visibly loses content


@dataclass(frozen=True)
class BucketUse:
    """The content of one bucket: its images, and its training samples per epoch.

    `cut` is the mean share of an image's pixels that its crop removes, from 0 to 1. `enlarged` is the number of images
    that are smaller than the bucket.
    """

    width: int
    height: int
    images: int
    samples: int
    cut: float
    enlarged: int


def bucket_uses(cropped: Sequence[CroppedExample]) -> list[BucketUse]:
    """Return one entry per bucket, the one with the most images first."""
    by_size: dict[Size, list[CroppedExample]] = {}
    for one in cropped:
        by_size.setdefault(one.size, []).append(one)
    uses = [
        BucketUse(
            size.width, size.height, len(held), sum(one.example.repeats for one in held),
            round(sum(one.crops[0].cut for one in held) / len(held), 4),
            sum(one.crops[0].is_enlarged for one in held),
        )
        for size, held in by_size.items()
    ]  # fmt: skip
    return sorted(uses, key=lambda use: (-use.images, -use.width))


def describe_crop_loss(cropped: Sequence[CroppedExample]) -> str:
    """Return a line with the images in each bucket, the mean crop loss, the worst image and the upscaled images.

    Empty if all images are in one bucket and hardly anything is cropped off.
    """
    if len({one.size for one in cropped}) == 1 and _mean_cut(cropped) < LITTLE:
        return ""
    buckets = ", ".join(f"{use.width}x{use.height} ({use.images})" for use in bucket_uses(cropped))
    worst = max(cropped, key=lambda one: one.crops[0].cut)
    line = f"  buckets: {buckets}; cropping removes {_mean_cut(cropped):.0%} of the pixels"
    if worst.crops[0].cut > MUCH:
        much = sum(one.crops[0].cut > MUCH for one in cropped)
        line += f", over {MUCH:.0%} in {much} of {len(cropped)} crops"
        line += f", most in {worst.example.image.name} ({worst.crops[0].cut:.0%})"
    enlarged = sum(one.crops[0].is_enlarged for one in cropped)
    return line + (
        f"; {enlarged} of {len(cropped)} are upscaled (--no-bucket-upscale keeps their size)" if enlarged else ""
    )


def _mean_cut(cropped: Sequence[CroppedExample]) -> float:
    return sum(one.crops[0].cut for one in cropped) / len(cropped)
