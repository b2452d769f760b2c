"""Finds a mark at the same place in most images of a dataset: a signature, a watermark or a date.

Gradients that the images share survive in their mean, and all others cancel out. Watermarks are extracted from
collections in the same way (Dekel et al. 2017, "On the Effectiveness of Visible Watermarks"). Only strips along the
upper and lower edge are searched, next to the corners, where such marks usually are. Text in a single image is not
detected: no cheap method does it reliably.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE_PX = 320  # longer side of the image from which the corner strips are taken
STRIP = (48, 128)  # height and width in pixels
PLACES = ("upper left", "upper right", "lower left", "lower right")
MIN_IMAGES = 8
MAX_IMAGES = 400  # enough for a decision
MIN_T = 3.0  # mean gradient divided by its standard error
MIN_GRADIENT = 4.0  # levels per pixel
MIN_PIXELS, MAX_SHARE = 24, 0.35  # size of a mark; if it covers more of a strip, the images themselves are similar
MIN_STROKES = 0.3  # share of rising and of falling gradients: strokes have both, the outline of an object only one
PRESENT = 0.6  # share of the images in which a gradient must have the sign of the mark


@dataclass(frozen=True)
class Corners:
    """Gray strips at the four corners, (4, 48, 128) uint8, or None for an image that is too small."""

    strips: np.ndarray | None


@dataclass(frozen=True)
class Stamp:
    """The corner that a mark is in, and the share of the strip that it covers."""

    place: str
    share: float


def corners_of(image: Image.Image) -> Corners:
    """Return the corner strips of an RGB image, scaled to 320 px on its longer side."""
    scale = SIDE_PX / max(image.size)
    if min(image.size) * scale < STRIP[0] * 2 or max(image.size) < SIDE_PX // 2:
        return Corners(None)
    size = (max(STRIP[1], round(image.width * scale)), round(image.height * scale))
    gray = np.asarray(image.convert("L").resize(size, Image.Resampling.BILINEAR, reducing_gap=2))
    height, width = STRIP
    upper, lower = gray[:height], gray[-height:]
    return Corners(np.stack([strip for row in (upper, lower) for strip in (row[:, :width], row[:, -width:])]))


def stamps_in(images: Sequence[Corners]) -> list[Stamp]:
    """Return the marks that most images share; empty if the images themselves are too similar to decide."""
    strips = [one.strips for one in images if one.strips is not None][:MAX_IMAGES]
    if len(strips) < max(MIN_IMAGES, len(images[:MAX_IMAGES]) * PRESENT):
        return []
    gray = np.stack(strips).astype(np.int16)  # (N, 4, 48, 128)
    dx = _shared_signs(np.diff(gray, axis=3)[:, :, :-1])
    dy = _shared_signs(np.diff(gray, axis=2)[..., :-1])
    return [
        Stamp(place, float(marked.mean()))
        for place, rise, fall in zip(PLACES, (dx > 0) | (dy > 0), (dx < 0) | (dy < 0), strict=True)
        if MIN_PIXELS <= (marked := rise | fall).sum() <= MAX_SHARE * marked.size
        and min(rise.sum(), fall.sum()) >= MIN_STROKES * marked.sum()
    ]


def _shared_signs(gradients: np.ndarray) -> np.ndarray:
    """Return the sign of gradients (N, 4, H, W) with a significant mean in most images: -1, 0 or 1, (4, H, W)."""
    mean = gradients.mean(0)
    error = gradients.std(0) / len(gradients) ** 0.5 + 0.5
    same_sign = (np.sign(gradients) == np.sign(mean)).mean(0)
    is_shared = (np.abs(mean) > MIN_GRADIENT) & (np.abs(mean) > MIN_T * error) & (same_sign >= PRESENT)
    return np.sign(mean) * is_shared
