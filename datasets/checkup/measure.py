"""One look at a picture: everything that the check-up wants to know of it, its pixels read once.

Blur, borders and light are measured at the size at which training sees it, where a camera's softness is gone and what
is left will be learned; a picture that must be enlarged is measured as it is.
"""

import io
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from scumble.configs.errors import Refused

from ..reading.folder import Example
from ..reading.images import ENOUGH, Crop, Size, read_rgb
from ..reading.masks import read_mask
from .duplicates import Likeness, likeness_of
from .exposure import Exposure, exposure_of
from .jpeg import block_steps, quality_of
from .letterbox import Borders, borders_of
from .sharpness import edge_blur
from .watermarks import Corners, corners_of

THUMB_PX = 400  # longer side
THUMB_QUALITY = 82
BORDERS_PX = 512
BLOCKS_PX = 1024
BLOCKS_SCALE = 0.5  # blocks of 8 pixels are averaged away where a picture is reduced further
WORKERS = 2


@dataclass(frozen=True)
class CheckedImage:
    """A picture of the set and the crops that training takes of it, the first at the run's own resolution."""

    example: Example
    crops: tuple[Crop, ...]


@dataclass(frozen=True)
class Thumb:
    """A small JPEG of the whole picture, and its mask as small ("L" as PNG), where there is one."""

    jpeg: bytes
    mask: bytes | None


@dataclass(frozen=True)
class ImageMeasures:
    """What was measured. `borders` count in pixels of the original; `quality` is a JPEG's, None for other files."""

    subject: CheckedImage
    digest: str
    likeness: Likeness
    exposure: Exposure
    borders: Borders
    blur_px: float
    quality: int | None
    block_steps: float
    corners: Corners
    thumb: Thumb | None

    @property
    def path(self) -> Path:
        return self.subject.example.image

    @property
    def size(self) -> Size:
        return self.crop.original

    @property
    def crop(self) -> Crop:
        return self.subject.crops[0]

    @property
    def scale(self) -> float:
        """By how much training enlarges the picture; under 1 it is reduced."""
        return self.crop.resized.width / self.crop.original.width


def measure_image(subject: CheckedImage, with_thumb: bool = True) -> ImageMeasures:
    """Read a picture once and measure it. Raises `Refused` naming a file that cannot be read."""
    path, crop = subject.example.image, subject.crops[0]
    picture = read_rgb(path, Size(ENOUGH * crop.resized.width, ENOUGH * crop.resized.height))
    seen = picture
    if crop.resized.width < picture.width:
        seen = picture.resize((crop.resized.width, crop.resized.height), Image.Resampling.LANCZOS, reducing_gap=3)
    borders = _borders(seen)
    inner = seen.crop((borders.left, borders.top, seen.width - borders.right, seen.height - borders.bottom))
    is_whole = picture.size == (crop.original.width, crop.original.height)
    steps = block_steps(_middle(picture)) if is_whole and crop.resized.width > BLOCKS_SCALE * picture.width else 0.0
    return ImageMeasures(
        subject, subject.example.digest, likeness_of(inner), exposure_of(inner),
        _scaled(borders, crop.original.width / seen.width),
        edge_blur(np.asarray(inner.convert("L"))), quality_of(path), steps, corners_of(seen),
        thumb_of(subject.example, picture) if with_thumb else None,
    )  # fmt: skip


def measure_images(subjects: Sequence[CheckedImage], with_thumbs: bool = True) -> Iterator[ImageMeasures]:
    """A look at each picture in the order of the set; two are read at a time, and few wait to be taken."""
    waiting = iter(subjects)
    with ThreadPoolExecutor(WORKERS) as pool:
        queue = deque(pool.submit(measure_image, subject, with_thumbs) for subject in islice(waiting, 2 * WORKERS))
        while queue:
            look = queue.popleft().result()
            queue.extend(pool.submit(measure_image, following, with_thumbs) for following in islice(waiting, 1))
            yield look


def thumb_of(example: Example, picture: Image.Image | None = None) -> Thumb:
    """Small copies of a picture and its mask; the picture is read where it is not given."""
    picture = picture or read_rgb(example.image, Size(2 * THUMB_PX, 2 * THUMB_PX))
    shrink = min(1.0, THUMB_PX / max(picture.size))
    size = max(1, round(picture.width * shrink)), max(1, round(picture.height * shrink))
    small = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)
    written = io.BytesIO()
    small.save(written, "JPEG", quality=THUMB_QUALITY, optimize=True)
    mask = None
    with suppress(Refused):  # a mask that cannot be used is named where the set is read
        found = read_mask(example.image, example.mask) if example.mask else None
        if found:
            masked = io.BytesIO()
            found.resize(size, Image.Resampling.BOX).save(masked, "PNG")
            mask = masked.getvalue()
    return Thumb(written.getvalue(), mask)


def _borders(picture: Image.Image) -> Borders:
    """Looked for in a smaller copy, which is enough to find bars of a hundredth of the side."""
    shrink = max(1, max(picture.size) // BORDERS_PX)
    found = borders_of(np.asarray(picture.reduce(shrink) if shrink > 1 else picture))
    return _scaled(found, shrink)


def _scaled(borders: Borders, scale: float) -> Borders:
    if not borders or scale == 1:
        return borders
    return replace(
        borders, left=round(borders.left * scale), top=round(borders.top * scale),
        right=round(borders.right * scale), bottom=round(borders.bottom * scale),
    )  # fmt: skip


def _middle(picture: Image.Image) -> np.ndarray:
    """The middle of a picture in grey, at most 1024² pixels: blocks are everywhere alike."""
    left, top = max(0, picture.width - BLOCKS_PX) // 2, max(0, picture.height - BLOCKS_PX) // 2
    box = (left, top, min(picture.width, left + BLOCKS_PX), min(picture.height, top + BLOCKS_PX))
    return np.asarray(picture.crop(box).convert("L"))
