"""What bringing pictures to buckets costs: how much of each is cut, and which are enlarged."""

from collections.abc import Sequence
from dataclasses import dataclass

from .crops import CroppedExample
from .reading.images import Size

LITTLE = 0.01
MUCH = 0.2  # of a picture's pixels cut: the eye misses what was there


@dataclass(frozen=True)
class BucketUse:
    """What one bucket holds: pictures, looks at them in an epoch, and its waste.

    `cut` is the mean share of a picture's pixels that its crop leaves out, from 0 to 1; `enlarged` counts pictures
    that are smaller than the bucket.
    """

    width: int
    height: int
    images: int
    samples: int
    cut: float
    enlarged: int


def bucket_uses(views: Sequence[CroppedExample]) -> list[BucketUse]:
    """One entry for each bucket, that of the most pictures first."""
    by_size: dict[Size, list[CroppedExample]] = {}
    for view in views:
        by_size.setdefault(view.size, []).append(view)
    uses = [
        BucketUse(
            size.width, size.height, len(held), sum(view.example.repeats for view in held),
            round(sum(view.crops[0].cut for view in held) / len(held), 4),
            sum(view.crops[0].is_enlarged for view in held),
        )
        for size, held in by_size.items()
    ]  # fmt: skip
    return sorted(uses, key=lambda use: (-use.images, -use.width))


def describe_crop_loss(views: Sequence[CroppedExample]) -> str:
    """The waste in a line for people: buckets with their pictures, what is cut on the whole, and of which the most.

    Empty where one bucket holds everything and nothing to speak of is lost.
    """
    if len({view.size for view in views}) == 1 and _mean_cut(views) < LITTLE:
        return ""
    buckets = ", ".join(f"{use.width}x{use.height} ({use.images})" for use in bucket_uses(views))
    worst = max(views, key=lambda view: view.crops[0].cut)
    told = f"  buckets: {buckets}; cropping leaves out {_mean_cut(views):.0%} of the pixels"
    if worst.crops[0].cut > MUCH:
        much = sum(view.crops[0].cut > MUCH for view in views)
        told += f", more than {MUCH:.0%} of {much}, most of {worst.example.image.name}: {worst.crops[0].cut:.0%}"
    enlarged = sum(view.crops[0].is_enlarged for view in views)
    return told + (
        f"; {enlarged} of {len(views)} are enlarged (--no-bucket-upscale keeps their size)" if enlarged else ""
    )


def _mean_cut(views: Sequence[CroppedExample]) -> float:
    return sum(view.crops[0].cut for view in views) / len(views)
