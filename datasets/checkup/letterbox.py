"""Finds bars and frames around an image: uniform strips at opposite edges that end in a straight line.

An object on a uniform background is not framed: there, only the object interrupts the background, not a whole line.
"""

import math
from dataclasses import dataclass

import numpy as np

UNIFORM = 14  # levels of 255 by which a bar may vary
RINGING = 48  # levels that JPEG ringing may add to a bar near its end
STRAY = 0.02  # share of the pixels of a bar's line that may vary more
END_CHANGED = 0.82  # share of the first line after a bar that must differ in color; at an object, less does
BEFORE_CHANGED = 0.6  # share that may already differ two lines earlier: the change at rounded corners is more gradual
RINGING_LINES = 9  # lines that JPEG ringing may span at the end of a bar
SAME_COLOR = 24  # levels by which two opposite bars may differ
MIN_SHARE = 0.01  # of the side
MAX_SHARE = 0.45


@dataclass(frozen=True)
class Borders:
    """The width in pixels of the bar at each edge, 0 for none."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def __bool__(self) -> bool:
        return any((self.left, self.top, self.right, self.bottom))


def borders_of(pixels: np.ndarray) -> Borders:
    """Find the bars of an RGB image (H, W, 3): at the top and bottom, at both sides, or all around."""
    top, bottom = _pair(pixels)
    inner = pixels[top : len(pixels) - bottom]
    left, right = _pair(inner.transpose(1, 0, 2))
    if (left or right) and not (top or bottom):  # the sides of a frame can hide where its top bar ends
        top, bottom = _pair(pixels[:, left : pixels.shape[1] - right])
    return Borders(left, top, right, bottom)


def _pair(pixels: np.ndarray) -> tuple[int, int]:
    """Return the heights of the bars at the top and bottom, or 0, 0 unless there are two of the same color."""
    if min(pixels.shape[:2]) < 16:
        return 0, 0
    first, first_color = _bar(pixels)
    last, last_color = _bar(pixels[::-1])
    if not first or not last or np.abs(first_color - last_color).max() > SAME_COLOR:
        return 0, 0
    return first, last


def _bar(pixels: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the height of the bar at the top edge, 0 for none, and its color."""
    height = len(pixels)
    min_height = max(2, math.ceil(MIN_SHARE * height))
    color = np.median(pixels[: max(1, height // 200)].reshape(-1, pixels.shape[2]), axis=0)
    thickness = _count_uniform_lines(pixels[:min_height], color)
    if thickness == min_height:
        thickness = _count_uniform_lines(pixels[: int(MAX_SHARE * height) + 1], color)
    if not min_height <= thickness <= MAX_SHARE * height:
        return 0, color
    lines = _color_distance(pixels[thickness - 2 : thickness + RINGING_LINES], color)
    shares = (lines > UNIFORM).mean(1)
    ends = (shares[2:] >= END_CHANGED) & (shares[:-2] <= BEFORE_CHANGED)
    return (thickness if ends.any() else 0), color


def _count_uniform_lines(pixels: np.ndarray, color: np.ndarray) -> int:
    """Count the lines from the top that have a uniform color, apart from JPEG artifacts."""
    distance = _color_distance(pixels, color)
    broken = np.flatnonzero(((distance > RINGING).mean(1) > STRAY) | (distance.mean(1) > UNIFORM / 2))
    return int(broken[0]) if len(broken) else len(pixels)


def _color_distance(pixels: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Return the difference of each pixel to a color in levels, (H, W), in the channel where it is largest."""
    channels = [np.abs(pixels[..., channel].astype(np.int16) - np.int16(color[channel])) for channel in range(3)]
    return np.maximum(np.maximum(channels[0], channels[1]), channels[2])
