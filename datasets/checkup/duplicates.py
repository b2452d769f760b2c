"""Finds files that show the same image: perceptual hashes select candidates, and aligned small copies decide.

The hash is pHash (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", the DCT hash),
bit for bit that of the library ImageHash. It captures shapes, not details: two faces of one cat have the same hash.
Therefore candidates are compared pixel by pixel after matching their tones, and the largest local difference counts.

Among 583 images in one style, no two differ by less than 0.12 everywhere. Copies at half the size, as JPEG of quality
10, with noise, in other light or mirrored differ by less than 0.10 in 99 of 100 cases (tests/benchmarks/checkup.py).
A copy cropped by 5 % or more, or rotated, counts as another image, since a detail next to the whole is useful.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

HASH_SIDE, SMALL_SIDE, TINY_SIDE = 8, 32, 8
NEAR_BITS = 12  # of 64: the same image in poor light or as a poor JPEG differs by at most 12
SAME_IMAGE = 0.10  # largest local difference, as a share of the full range
SAME_CONTRAST = 0.75  # and in standard deviations of the image: two skies or two lawns differ
LOOK_ALIKE = 0.9  # correlation of tiny copies
ROWS = 256
MIN_CORRELATION = 0.6  # of tiny copies; images below it are not compared pixel by pixel
MAX_COMPARISONS = 16  # the most similar candidates: enough to find a copy, and fast for 10,000 similar images
COSINES = np.cos(np.pi / SMALL_SIDE * (np.arange(SMALL_SIDE) + 0.5) * np.arange(HASH_SIDE)[:, None])  # (8, 32)


@dataclass(frozen=True)
class Likeness:
    """The data for comparing an image: hashes of it and its mirror image, and copies of 32² and 8² pixels."""

    hash: int
    mirrored: int
    small: np.ndarray  # (32, 32, 3) uint8
    tiny: np.ndarray  # (192,) fp32, mean 0, norm 1


def likeness_of(image: Image.Image) -> Likeness:
    """Compute the likeness data of an RGB image of any size."""
    small = image.resize((SMALL_SIDE, SMALL_SIDE), Image.Resampling.BOX)
    gray = image.convert("L").resize((SMALL_SIDE, SMALL_SIDE), Image.Resampling.LANCZOS)
    mirrored = gray.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(small)
    return Likeness(phash(gray), phash(mirrored), pixels, _tiny(pixels))


def phash(gray: Image.Image) -> int:
    """Return the 64-bit hash of a gray image of 32² pixels: which of the lowest 8² frequencies exceed their median."""
    low = COSINES @ np.asarray(gray, np.float64) @ COSINES.T  # DCT-II up to a common factor
    bits = (low > np.median(low)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest local difference of two small copies, from 0 to 1, after matching their tones."""
    return max(_local(one, other), _local(other, one))


def same_picture(images: Sequence[Likeness]) -> list[list[int]]:
    """Return groups of two or more indices that show the same image, mirrored or not."""
    hashes = np.array([one.hash for one in images], np.uint64)
    mirrored = np.array([one.mirrored for one in images], np.uint64)
    tiny = np.array([one.tiny for one in images], np.float32).reshape(-1, TINY_SIDE, TINY_SIDE, 3)  # (N, 8, 8, 3)

    def candidates(row: int) -> np.ndarray:
        upright = np.bitwise_count(hashes[row + 1 :] ^ hashes[row])
        flipped = np.bitwise_count(mirrored[row + 1 :] ^ hashes[row])
        others = row + 1 + np.flatnonzero(np.minimum(upright, flipped) <= NEAR_BITS)
        variants = (tiny[row], tiny[row, :, ::-1])
        correlations = np.max([np.tensordot(tiny[others], variant, 3) for variant in variants], axis=0)
        order = np.argsort(-correlations, kind="stable")[:MAX_COMPARISONS]
        return others[order[correlations[order] > MIN_CORRELATION]]

    def same(row: int, other: int) -> bool:
        one, two = images[row].small, images[other].small
        limit = min(SAME_IMAGE, SAME_CONTRAST * float(one.std()) / 255)
        return difference(one, two) < limit or difference(one, two[:, ::-1]) < limit

    return _groups(len(images), candidates, same)


def look_alike(images: Sequence[Likeness]) -> list[list[int]]:
    """Return groups of two or more indices with similar colors in the same places, such as the same pose."""
    correlations = _Correlations(images)
    return _groups(len(images), lambda row: row + 1 + np.flatnonzero(correlations[row][row + 1 :] > LOOK_ALIKE))


def nearest(images: Sequence[Likeness]) -> np.ndarray:
    """Return the correlation of each image with the most similar other image, (N,) from -1 to 1."""
    correlations, found = _Correlations(images), np.full(len(images), -1.0)
    for row in range(len(images)):
        found[row] = np.delete(correlations[row], row).max(initial=-1)
    return found


class _Correlations:
    """Rows of the correlation matrix, (N,) each, computed in blocks so that the whole matrix need not fit in memory."""

    def __init__(self, images: Sequence[Likeness]):
        self.tiny = np.array([one.tiny for one in images], np.float32).reshape(len(images), TINY_SIDE**2 * 3)
        self.start, self.rows = 0, np.empty((0, len(images)), np.float32)

    def __getitem__(self, row: int) -> np.ndarray:
        if not self.start <= row < self.start + len(self.rows):
            self.start, self.rows = row, self.tiny[row : row + ROWS] @ self.tiny.T
        return self.rows[row - self.start]


def _local(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest mean difference over 3² pixels between `other` and `one` with the tones of `other`."""
    gap = np.pad(_match_tones(one, other) - other, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = gap[:-2] + gap[1:-1] + gap[2:]
    return float(np.abs(rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]).max()) / 9 / 255


def _match_tones(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Match the histogram of `one` to `other`, with one curve for all channels, to ignore differences in light.

    Pixels with the same value keep a common value: the mean of the pixels of `other` at the same ranks.
    """
    counts, theirs = (np.bincount(pixels.ravel(), minlength=256) for pixels in (one, other))
    ends, their_ends = np.cumsum(counts), np.concatenate([[0], np.cumsum(theirs)])
    sums = np.concatenate([[0], np.cumsum(theirs * np.arange(256))])  # cumulative, from the darkest pixels
    below = np.interp(np.concatenate([[0], ends]), their_ends, sums)
    means = np.diff(below) / np.maximum(counts, 1)
    return means[one]


def _tiny(small: np.ndarray) -> np.ndarray:
    """Return (192,) fp32, mean 0, norm 1, from means over 4² pixels of a small copy."""
    block = SMALL_SIDE // TINY_SIDE
    tiny = small.reshape(TINY_SIDE, block, TINY_SIDE, block, 3).mean((1, 3), dtype=np.float32).ravel()
    tiny -= tiny.mean()
    return tiny / max(1e-6, float(np.linalg.norm(tiny)))


def _groups(
    count: int, candidates: Callable[[int], np.ndarray], same: Callable[[int, int], bool] = lambda one, other: True
) -> list[list[int]]:
    """Return the connected components of two or more indices, sorted. Connected indices are not compared again."""
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
