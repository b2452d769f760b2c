"""Bars and frames around a picture: even strips at two opposite edges that end in a straight line.

A thing on an even ground is no picture in a frame: there only the thing itself ends the ground, not the whole line.
"""

import math
from dataclasses import dataclass

import numpy as np

EVEN = 14  # levels of 255 by which a bar may vary
RINGING = 48  # levels that a JPEG may add to a bar near its end
STRAY = 0.02  # share of a bar's line that may vary more
ENDS = 0.82  # share of the first line behind a bar that must be of another colour; a thing on a ground ends less of it
BEFORE = 0.6  # share that may be of another colour two lines before that one: rounded corners grow more slowly
REACH = 9  # lines that a JPEG's ringing may lie between
SAME_COLOUR = 24  # levels between two opposite bars
LEAST = 0.01  # of the side
MOST = 0.45


@dataclass(frozen=True)
class Borders:
    """Widths in pixels of the bars at each edge; 0: none."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def __bool__(self) -> bool:
        return any((self.left, self.top, self.right, self.bottom))


def borders_of(pixels: np.ndarray) -> Borders:
    """Of an RGB picture (H, W, 3): bars above and below, at both sides, or a frame."""
    top, bottom = _pair(pixels)
    inner = pixels[top : len(pixels) - bottom]
    left, right = _pair(inner.transpose(1, 0, 2))
    if (left or right) and not (top or bottom):  # a frame's upper bar may only end once its sides are gone
        top, bottom = _pair(pixels[:, left : pixels.shape[1] - right])
    return Borders(left, top, right, bottom)


def _pair(pixels: np.ndarray) -> tuple[int, int]:
    """Heights of the bars above and below, or none."""
    if min(pixels.shape[:2]) < 16:
        return 0, 0
    first, first_colour = _bar(pixels)
    last, last_colour = _bar(pixels[::-1])
    if not first or not last or np.abs(first_colour - last_colour).max() > SAME_COLOUR:
        return 0, 0
    return first, last


def _bar(pixels: np.ndarray) -> tuple[int, np.ndarray]:
    """Height of the bar at the upper edge and its colour; 0 where there is none."""
    height = len(pixels)
    least = max(2, math.ceil(LEAST * height))
    colour = np.median(pixels[: max(1, height // 200)].reshape(-1, pixels.shape[2]), axis=0)
    thick = _even_lines(pixels[:least], colour)
    if thick == least:
        thick = _even_lines(pixels[: int(MOST * height) + 1], colour)
    if not least <= thick <= MOST * height:
        return 0, colour
    lines = _apart(pixels[thick - 2 : thick + REACH], colour)
    shares = (lines > EVEN).mean(1)
    ends = (shares[2:] >= ENDS) & (shares[:-2] <= BEFORE)
    return (thick if ends.any() else 0), colour


def _even_lines(pixels: np.ndarray, colour: np.ndarray) -> int:
    """How many lines from above are of one colour, but for what a JPEG adds."""
    apart = _apart(pixels, colour)
    broken = np.flatnonzero(((apart > RINGING).mean(1) > STRAY) | (apart.mean(1) > EVEN / 2))
    return int(broken[0]) if len(broken) else len(pixels)


def _apart(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Levels between each pixel and a colour, in the channel where it is the most, (H, W)."""
    channels = [np.abs(pixels[..., channel].astype(np.int16) - np.int16(colour[channel])) for channel in range(3)]
    return np.maximum(np.maximum(channels[0], channels[1]), channels[2])
