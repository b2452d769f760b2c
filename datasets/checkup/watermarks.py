"""A mark that stands at one place in most pictures of a set: a signature, a watermark, a date.

Slopes of light that pictures share survive their mean, all others cancel: so does a watermark come out of a collection
(Dekel et al. 2017, "On the Effectiveness of Visible Watermarks"). Looked at are strips along the upper and lower edge,
from either corner, where such marks stand; text in one picture alone is not looked for, which no cheap way finds well.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE_PX = 320  # longer side at which the corners are cut
STRIP = (48, 128)  # height and width in pixels
PLACES = ("upper left", "upper right", "lower left", "lower right")
FEWEST = 8  # pictures
MOST = 400  # enough to tell
STEADY = 3.0  # mean slope over its standard error
STEEP = 4.0  # levels a pixel
LEAST, LARGEST = 24, 0.35  # pixels of a mark; share of a strip beyond which the pictures themselves are alike
STROKES = 0.3  # share of the slopes that rise, and that fall: a stroke has both, the outline of a thing but one
PRESENT = 0.6  # share of pictures in which a slope must go the mark's way


@dataclass(frozen=True)
class Corners:
    """Grey strips at the four corners, (4, 48, 128) uint8, or none of a picture too small."""

    strips: np.ndarray | None


@dataclass(frozen=True)
class Stamp:
    """Where a mark stands, and the share of the strip that it covers."""

    place: str
    share: float


def corners_of(picture: Image.Image) -> Corners:
    """Of an RGB picture, at 320 px on its longer side."""
    scale = SIDE_PX / max(picture.size)
    if min(picture.size) * scale < STRIP[0] * 2 or max(picture.size) < SIDE_PX // 2:
        return Corners(None)
    size = (max(STRIP[1], round(picture.width * scale)), round(picture.height * scale))
    grey = np.asarray(picture.convert("L").resize(size, Image.Resampling.BILINEAR, reducing_gap=2))
    high, wide = STRIP
    upper, lower = grey[:high], grey[-high:]
    return Corners(np.stack([strip for row in (upper, lower) for strip in (row[:, :wide], row[:, -wide:])]))


def stamps_in(pictures: Sequence[Corners]) -> list[Stamp]:
    """The marks that stand in most of the pictures, and nothing where the pictures themselves are alike."""
    strips = [one.strips for one in pictures if one.strips is not None][:MOST]
    if len(strips) < max(FEWEST, len(pictures[:MOST]) * PRESENT):
        return []
    light = np.stack(strips).astype(np.int16)  # (N, 4, 48, 128)
    across = _steady(np.diff(light, axis=3)[:, :, :-1])
    down = _steady(np.diff(light, axis=2)[..., :-1])
    return [
        Stamp(place, float(seen.mean()))
        for place, rise, fall in zip(PLACES, (across > 0) | (down > 0), (across < 0) | (down < 0), strict=True)
        if LEAST <= (seen := rise | fall).sum() <= LARGEST * seen.size
        and min(rise.sum(), fall.sum()) >= STROKES * seen.sum()
    ]


def _steady(slopes: np.ndarray) -> np.ndarray:
    """Which way slopes (N, 4, H, W) go in most pictures, by a mean far above its chance: -1, 0 or 1 of (4, H, W)."""
    mean = slopes.mean(0)
    error = slopes.std(0) / len(slopes) ** 0.5 + 0.5
    same_way = (np.sign(slopes) == np.sign(mean)).mean(0)
    steady = (np.abs(mean) > STEEP) & (np.abs(mean) > STEADY * error) & (same_way >= PRESENT)
    return np.sign(mean) * steady
