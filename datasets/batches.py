"""Orders an epoch: every image exactly `repeats` times, in shuffled batches of one shape. Depends only on the seed."""

import random
from collections import Counter
from collections.abc import Hashable, Sequence


def epoch_batches(
    buckets: Sequence[Hashable], repeats: Sequence[int], batch: int, seed: int, epoch: int
) -> list[list[int]]:
    """Return the batches of example indices for one epoch (from 0); `buckets[i]` is the bucket of example i.

    No image is dropped or duplicated. If the size of a bucket is not a multiple of the batch size, its batches are made
    as equal as possible: 9 images with batch size 4 are split 3 + 3 + 3, not 4 + 4 + 1. Every sample has the same
    weight in any batch, since its loss is summed over samples and divided by the nominal number of samples per step.
    With a mean per batch, the leftover image of 4 + 4 + 1 would have four times the weight of the others, and the same
    if it were duplicated to fill its batch. Batches of different shapes are mixed.
    """
    rng = random.Random(f"{seed}/{epoch}/order")
    by_bucket: dict[Hashable, list[int]] = {}
    for index, (bucket, times) in enumerate(zip(buckets, repeats, strict=True)):
        by_bucket.setdefault(bucket, []).extend([index] * times)
    batches = []
    for indices in by_bucket.values():
        rng.shuffle(indices)
        start = 0
        for size in split_evenly(len(indices), batch):
            batches.append(indices[start : start + size])
            start += size
    rng.shuffle(batches)
    return batches


def split_evenly(count: int, batch: int) -> list[int]:
    """Split `count` into as few parts of at most `batch` as possible, which differ in size by at most one."""
    parts = -(-count // batch)
    return [count // parts + (part < count % parts) for part in range(parts)]


def batches_per_epoch(buckets: Sequence[Hashable], repeats: Sequence[int], batch: int) -> int:
    """Return the number of batches in an epoch, which is the same in all epochs."""
    return sum(batch_sizes(buckets, repeats, batch).values())


def batch_sizes(buckets: Sequence[Hashable], repeats: Sequence[int], batch: int) -> Counter[int]:
    """Count the batches of each size in an epoch."""
    counts: Counter[Hashable] = Counter()
    for bucket, times in zip(buckets, repeats, strict=True):
        counts[bucket] += times
    return Counter(size for count in counts.values() for size in split_evenly(count, batch))


def describe_batches(buckets: Sequence[Hashable], repeats: Sequence[int], batch: int) -> str:
    """Return a line with the number of batches of each size; empty if all batches are full."""
    sizes = batch_sizes(buckets, repeats, batch)
    if sizes.keys() == {batch}:
        return ""
    listed = ", ".join(f"{count} of size {size}" for size, count in sorted(sizes.items(), reverse=True))
    return f"  batches per epoch: {listed}, since a batch has one shape; every sample has the same weight"
