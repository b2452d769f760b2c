"""Whether two files show one picture: perceptual hashes find the candidates, small copies laid over each other decide.

The hash is pHash (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", the DCT hash),
bit for bit that of the library ImageHash. It sees shapes, not details: two faces of one cat have the same hash. So
candidates are laid over each other, their tones matched, and the largest difference in any one place counts.

Of 583 pictures in one style no two differ by less than 0.12 in every place; copies at half the size, as JPEG of quality
10, with noise, in other light or mirrored differ by less than 0.10 in 99 of 100 (tests/benchmarks/checkup.py).
A copy cropped by a twentieth or more, or turned, is another picture here: a detail beside the whole is good to have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

HASH_SIDE, SMALL_SIDE, TINY_SIDE = 8, 32, 8
NEAR_BITS = 12  # of 64: the same picture in poor light or as a poor JPEG keeps within 12
SAME_PICTURE = 0.10  # largest local difference, of the whole range
SAME_CONTRAST = 0.75  # and in standard deviations of the picture: two skies, two lawns are not one
LOOK_ALIKE = 0.9  # correlation of tiny copies
ROWS = 256
WORTH_A_LOOK = 0.6  # correlation of tiny copies under which two pictures are not laid over each other
MOST_LOOKS = 16  # those most alike that are: a copy is among them, and one framing of 10,000 pictures takes no hours
COSINES = np.cos(np.pi / SMALL_SIDE * (np.arange(SMALL_SIDE) + 0.5) * np.arange(HASH_SIDE)[:, None])  # (8, 32)


@dataclass(frozen=True)
class Likeness:
    """What is kept of a picture to compare it: hashes of it and its mirror image, and copies of 32² and 8² pixels."""

    hash: int
    mirrored: int
    small: np.ndarray  # (32, 32, 3) uint8
    tiny: np.ndarray  # (192,) fp32 of mean 0 and norm 1


def likeness_of(picture: Image.Image) -> Likeness:
    """Of an RGB picture of any size."""
    small = picture.resize((SMALL_SIDE, SMALL_SIDE), Image.Resampling.BOX)
    grey = picture.convert("L").resize((SMALL_SIDE, SMALL_SIDE), Image.Resampling.LANCZOS)
    mirrored = grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(small)
    return Likeness(phash(grey), phash(mirrored), pixels, _tiny(pixels))


def phash(grey: Image.Image) -> int:
    """64 bits of a grey picture of 32² pixels: is each of the lowest 8² frequencies above their median?"""
    low = COSINES @ np.asarray(grey, np.float64) @ COSINES.T  # DCT-II but for a factor that all share
    bits = (low > np.median(low)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference in any place of two small copies, from 0 to 1, their tones matched before."""
    return max(_local(one, other), _local(other, one))


def same_picture(pictures: Sequence[Likeness]) -> list[list[int]]:
    """Groups of two and more indices that show one picture, mirrored or not."""
    hashes = np.array([one.hash for one in pictures], np.uint64)
    mirrored = np.array([one.mirrored for one in pictures], np.uint64)
    tiny = np.array([one.tiny for one in pictures], np.float32).reshape(-1, TINY_SIDE, TINY_SIDE, 3)  # (N, 8, 8, 3)

    def near(row: int) -> np.ndarray:
        upright = np.bitwise_count(hashes[row + 1 :] ^ hashes[row])
        turned = np.bitwise_count(mirrored[row + 1 :] ^ hashes[row])
        others = row + 1 + np.flatnonzero(np.minimum(upright, turned) <= NEAR_BITS)
        ways = (tiny[row], tiny[row, :, ::-1])
        alike = np.max([np.tensordot(tiny[others], way, 3) for way in ways], axis=0)  # correlations
        order = np.argsort(-alike, kind="stable")[:MOST_LOOKS]
        return others[order[alike[order] > WORTH_A_LOOK]]

    def same(row: int, other: int) -> bool:
        one, two = pictures[row].small, pictures[other].small
        most = min(SAME_PICTURE, SAME_CONTRAST * float(one.std()) / 255)
        return difference(one, two) < most or difference(one, two[:, ::-1]) < most

    return _groups(len(pictures), near, same)


def look_alike(pictures: Sequence[Likeness]) -> list[list[int]]:
    """Groups of two and more indices whose colours lie in the same places: one pose on one ground, say."""
    correlations = _Correlations(pictures)
    return _groups(len(pictures), lambda row: row + 1 + np.flatnonzero(correlations[row][row + 1 :] > LOOK_ALIKE))


def nearest(pictures: Sequence[Likeness]) -> np.ndarray:
    """Of each picture the correlation with that other one which is most like it, (N,) from -1 to 1."""
    correlations, found = _Correlations(pictures), np.full(len(pictures), -1.0)
    for row in range(len(pictures)):
        found[row] = np.delete(correlations[row], row).max(initial=-1)
    return found


class _Correlations:
    """Rows of the matrix of correlations, (N,) each, computed some hundred at a time so that they need not all fit."""

    def __init__(self, pictures: Sequence[Likeness]):
        self.tiny = np.array([one.tiny for one in pictures], np.float32).reshape(len(pictures), TINY_SIDE**2 * 3)
        self.start, self.rows = 0, np.empty((0, len(pictures)), np.float32)

    def __getitem__(self, row: int) -> np.ndarray:
        if not self.start <= row < self.start + len(self.rows):
            self.start, self.rows = row, self.tiny[row : row + ROWS] @ self.tiny.T
        return self.rows[row - self.start]


def _local(one: np.ndarray, other: np.ndarray) -> float:
    """The largest mean difference over 3² pixels of `other` and `one` in the tones of `other`."""
    gap = np.pad(_in_tones_of(one, other) - other, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = gap[:-2] + gap[1:-1] + gap[2:]
    return float(np.abs(rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]).max()) / 9 / 255


def _in_tones_of(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`one` with the histogram of `other`, one curve for all channels, so that light and contrast do not count.

    Pixels of one value go to one value: the mean of those of `other` that stand at their ranks.
    """
    counts, theirs = (np.bincount(pixels.ravel(), minlength=256) for pixels in (one, other))
    ends, their_ends = np.cumsum(counts), np.concatenate([[0], np.cumsum(theirs)])
    sums = np.concatenate([[0], np.cumsum(theirs * np.arange(256))])  # of the pixels up to each end, lowest first
    below = np.interp(np.concatenate([[0], ends]), their_ends, sums)
    means = np.diff(below) / np.maximum(counts, 1)
    return means[one]


def _tiny(small: np.ndarray) -> np.ndarray:
    """(192,) fp32 of mean 0 and norm 1, from means over 4² pixels of a small copy."""
    part = SMALL_SIDE // TINY_SIDE
    tiny = small.reshape(TINY_SIDE, part, TINY_SIDE, part, 3).mean((1, 3), dtype=np.float32).ravel()
    tiny -= tiny.mean()
    return tiny / max(1e-6, float(np.linalg.norm(tiny)))


def _groups(
    count: int, candidates: Callable[[int], np.ndarray], same: Callable[[int, int], bool] = lambda one, other: True
) -> list[list[int]]:
    """Indices that are connected, each group sorted, the groups by their first; connected ones are not asked again."""
    group = np.arange(count)
    for row in range(count):
        others = candidates(row)
        for other in others[group[others] != group[row]]:
            if group[row] != group[other] and same(row, int(other)):
                low, high = sorted((group[row], group[other]))
                group[group == high] = low
    found: dict[int, list[int]] = {}
    for index, label in enumerate(group):
        found.setdefault(int(label), []).append(index)
    return [members for members in found.values() if len(members) > 1]
