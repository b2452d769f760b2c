"""Detects JPEG compression: the quality from the tables of a file, and 8x8 blocks in the pixels of any image.

An image that was saved as a poor JPEG and then as PNG or WebP has no such tables, but still shows the blocks.
"""

from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

LUMINANCE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip  # ITU-T T.81, table K.1
CLIPPED = 255  # the largest step in an 8-bit table
BLOCK = 8
SMOOTH = 12  # levels; larger steps are edges in the image content
VISIBLE = 0.15  # how much more often block edges occur at the grid position than at any other


def quality_of(path: Path) -> int | None:
    """Return the quality of the luminance table, 1 to 100 on the scale of libjpeg, or None for other formats than JPEG.

    libjpeg scales table K.1 by 5000 / q percent below quality 50, and by 200 - 2q percent above. Tables of other
    programs get the nearest quality on that scale.
    """
    with suppress(OSError, ValueError, SyntaxError), Image.open(path, formats=("JPEG",)) as image:
        table = getattr(image, "quantization", {}).get(0)
        if table and len(table) == len(LUMINANCE):
            pairs = [(step, own) for step, own in zip(table, LUMINANCE, strict=True) if step < CLIPPED]
            if not pairs:
                return 1
            percent = 100 * sum(step for step, _ in pairs) / sum(own for _, own in pairs)
            quality = (200 - percent) / 2 if percent <= 100 else 5000 / percent
            return round(min(100, max(1, quality)))
    return None


def block_steps(gray: np.ndarray) -> float:
    """Return the height in levels of the steps between 8x8 blocks in a gray image (H, W); 0 if none are visible.

    A block edge is a step higher than both of its neighbors, in smooth areas, at every eighth pixel and nowhere else
    (WebP and video also have steps at every fourth). The grid is found at any offset, so even after a crop, but not
    after resizing. Independently of the content, quality 50 leaves steps of about 1.4 levels, 30 of 2, and 10 of 4 or
    more.
    """
    horizontal, vertical = _grid(gray), _grid(gray.T)
    return max(0.0, (horizontal[1] + vertical[1]) / 2) if min(horizontal[0], vertical[0]) > VISIBLE else 0.0


def _grid(gray: np.ndarray) -> tuple[float, float]:
    """Return how much more often block edges occur at the best of 8 offsets than at the next, and their height."""
    if min(gray.shape) < 4 * BLOCK:
        return 0.0, 0.0
    steps = np.abs(np.diff(gray.astype(np.int16), axis=1))
    before, step, after = steps[:, :-2], steps[:, 1:-1], steps[:, 2:]
    highest = np.maximum(np.maximum(before, step), after)
    smooth = (highest > 0) & (highest <= SMOOTH)
    edge = smooth & (step > before) & (step > after)
    height = np.where(smooth, 2 * step - before - after, 0)
    width = step.shape[1] // BLOCK * BLOCK

    def by_offset(values: np.ndarray) -> np.ndarray:  # (8,)
        return values[:, :width].sum(0, dtype=np.int64).reshape(-1, BLOCK).sum(0)

    num_smooth = np.maximum(by_offset(smooth), 1)
    rates = by_offset(edge) / num_smooth
    offset = int(rates.argmax())
    return float(rates[offset] - np.sort(rates)[-2]), float((by_offset(height) / num_smooth)[offset]) / 2
