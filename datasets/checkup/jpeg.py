"""Marks that JPEG leaves: the quality that a file's tables tell, and blocks of 8² pixels in any picture.

A picture that was saved as a poor JPEG and then as PNG or WebP has no tables, but it has the blocks.
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
CLIPPED = 255  # the largest step of a table in 8 bits
BLOCK = 8
EVEN = 12  # levels; higher steps are edges of things
SEEN = 0.15  # how much more often a grid shows at its own place than at any other


def quality_of(path: Path) -> int | None:
    """Quality from 1 to 100 on libjpeg's scale, of the luminance table; None for files that are no JPEG.

    libjpeg scales table K.1 by s = 5000 / q percent below quality 50 and 200 - 2q above; other programs' tables get
    the quality of that scale which is nearest to theirs.
    """
    with suppress(OSError, ValueError, SyntaxError), Image.open(path, formats=("JPEG",)) as picture:
        table = getattr(picture, "quantization", {}).get(0)
        if table and len(table) == len(LUMINANCE):
            pairs = [(step, own) for step, own in zip(table, LUMINANCE, strict=True) if step < CLIPPED]
            if not pairs:
                return 1
            percent = 100 * sum(step for step, _ in pairs) / sum(own for _, own in pairs)
            quality = (200 - percent) / 2 if percent <= 100 else 5000 / percent
            return round(min(100, max(1, quality)))
    return None


def block_steps(grey: np.ndarray) -> float:
    """Height in levels of the steps between the blocks of 8² pixels of a grey picture (H, W); 0 where none are seen.

    A block's edge is a step higher than both beside it, in even places, at every eighth pixel and nowhere else (WebP
    and video have such steps at every fourth too). The grid is found where a crop moved it, not after a resizing.
    Whatever the picture holds, quality 50 leaves steps of about 1.4 levels, 30 of 2, 10 of 4 and more.
    """
    across, down = _grid(grey), _grid(grey.T)
    return max(0.0, (across[1] + down[1]) / 2) if min(across[0], down[0]) > SEEN else 0.0


def _grid(grey: np.ndarray) -> tuple[float, float]:
    """How much more often a step is a block's edge at the best of eight places than at the next best; its height."""
    if min(grey.shape) < 4 * BLOCK:
        return 0.0, 0.0
    steps = np.abs(np.diff(grey.astype(np.int16), axis=1))
    before, step, behind = steps[:, :-2], steps[:, 1:-1], steps[:, 2:]
    highest = np.maximum(np.maximum(before, step), behind)
    even = (highest > 0) & (highest <= EVEN)
    edge = even & (step > before) & (step > behind)
    height = np.where(even, 2 * step - before - behind, 0)
    places = step.shape[1] // BLOCK * BLOCK

    def by_place(values: np.ndarray) -> np.ndarray:  # (8,)
        return values[:, :places].sum(0, dtype=np.int64).reshape(-1, BLOCK).sum(0)

    looked_at = np.maximum(by_place(even), 1)
    rates = by_place(edge) / looked_at
    place = int(rates.argmax())
    return float(rates[place] - np.sort(rates)[-2]), float((by_place(height) / looked_at)[place]) / 2
