"""The order of training: every picture exactly `repeats` times an epoch, in batches of one shape, from the seed."""

import random
from collections import Counter
from collections.abc import Hashable, Sequence


def epoch_batches(
    buckets: Sequence[Hashable], repeats: Sequence[int], batch: int, seed: int, epoch: int
) -> list[list[int]]:
    """Batches of example indices for one epoch (from 0); `buckets[i]` is the shape of example i.

    No picture is dropped or doubled, so where a bucket does not come out even, its batches are made alike: 9 pictures
    in batches of 4 are 3 + 3 + 3, not 4 + 4 + 1. A look weighs the same in any batch, since the loss is summed over
    looks and divided by their usual number in a step: were each batch averaged, the picture that is left over would
    pull four times as hard as the others, and so it would if it were doubled to fill its batch. Batches of different
    shapes are mixed.
    """
    draw = random.Random(f"{seed}/{epoch}/order")
    by_bucket: dict[Hashable, list[int]] = {}
    for index, (bucket, times) in enumerate(zip(buckets, repeats, strict=True)):
        by_bucket.setdefault(bucket, []).extend([index] * times)
    batches = []
    for indices in by_bucket.values():
        draw.shuffle(indices)
        start = 0
        for size in even(len(indices), batch):
            batches.append(indices[start : start + size])
            start += size
    draw.shuffle(batches)
    return batches


def even(count: int, batch: int) -> list[int]:
    """`count` in as few parts of at most `batch` as can be, none larger than another by more than one."""
    parts = -(-count // batch)
    return [count // parts + (part < count % parts) for part in range(parts)]


def batches_per_epoch(buckets: Sequence[Hashable], repeats: Sequence[int], batch: int) -> int:
    """How many batches `epoch_batches` gives, the same in each epoch."""
    return sum(batch_sizes(buckets, repeats, batch).values())


def batch_sizes(buckets: Sequence[Hashable], repeats: Sequence[int], batch: int) -> Counter[int]:
    """How many batches of each size an epoch has."""
    counts: Counter[Hashable] = Counter()
    for bucket, times in zip(buckets, repeats, strict=True):
        counts[bucket] += times
    return Counter(size for count in counts.values() for size in even(count, batch))


def describe_batches(buckets: Sequence[Hashable], repeats: Sequence[int], batch: int) -> str:
    """Which batches are smaller than `batch`, in a line for people; empty where none is."""
    sizes = batch_sizes(buckets, repeats, batch)
    if sizes.keys() == {batch}:
        return ""
    told = ", ".join(f"{count} of {size}" for size, count in sorted(sizes.items(), reverse=True))
    return f"  batches in an epoch: {told}, since batches have one shape; each look weighs the same"
