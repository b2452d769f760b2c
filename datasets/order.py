"""The order of training: every picture exactly `repeats` times an epoch, in batches of one shape, from the seed."""

import random
from collections.abc import Hashable, Sequence


def epoch_batches(
    buckets: Sequence[Hashable], repeats: Sequence[int], batch: int, seed: int, epoch: int
) -> list[list[int]]:
    """Batches of example indices for one epoch (from 0); `buckets[i]` is the shape of example i.

    Batches of different shapes are mixed. The last batch of a shape may be smaller: no picture is dropped or doubled.
    """
    draw = random.Random(f"{seed}/{epoch}/order")
    by_bucket: dict[Hashable, list[int]] = {}
    for index, (bucket, times) in enumerate(zip(buckets, repeats, strict=True)):
        by_bucket.setdefault(bucket, []).extend([index] * times)
    batches = []
    for indices in by_bucket.values():
        draw.shuffle(indices)
        batches += [indices[start : start + batch] for start in range(0, len(indices), batch)]
    draw.shuffle(batches)
    return batches


def batches_per_epoch(buckets: Sequence[Hashable], repeats: Sequence[int], batch: int) -> int:
    """How many batches `epoch_batches` gives, the same in each epoch."""
    counts: dict[Hashable, int] = {}
    for bucket, times in zip(buckets, repeats, strict=True):
        counts[bucket] = counts.get(bucket, 0) + times
    return sum(-(-count // batch) for count in counts.values())
