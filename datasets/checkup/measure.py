"""Measures everything the check-up needs to know about an image, reading its pixels once.

Blur, borders and exposure are measured at training resolution, where the softness of a camera has disappeared and what
remains will be learned. An image that must be upscaled is measured at its own size.
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
from ..reading.images import OVERSAMPLING, Crop, Size, read_rgb
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
BLOCKS_SCALE = 0.5  # blocks of 8 pixels disappear if an image is reduced further
WORKERS = 2


@dataclass(frozen=True)
class CheckedImage:
    """An image of the dataset and its training crops, the first at the resolution of the run."""

    example: Example
    crops: tuple[Crop, ...]


@dataclass(frozen=True)
class Thumb:
    """A small JPEG of the whole image, and its mask at the same size ("L" as PNG), or None."""

    jpeg: bytes
    mask: bytes | None


@dataclass(frozen=True)
class ImageMeasures:
    """The measurements of an image. `borders` are in pixels of the original; `quality` is None for non-JPEG files."""

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
        """The factor by which training upscales the image; below 1, it is reduced."""
        return self.crop.resized.width / self.crop.original.width


def measure_image(subject: CheckedImage, with_thumb: bool = True) -> ImageMeasures:
    """Read an image once and measure it. Raises `Refused` naming a file that cannot be read."""
    path, crop = subject.example.image, subject.crops[0]
    image = read_rgb(path, Size(OVERSAMPLING * crop.resized.width, OVERSAMPLING * crop.resized.height))
    scaled = image
    if crop.resized.width < image.width:
        scaled = image.resize((crop.resized.width, crop.resized.height), Image.Resampling.LANCZOS, reducing_gap=3)
    borders = _borders(scaled)
    inner = scaled.crop((borders.left, borders.top, scaled.width - borders.right, scaled.height - borders.bottom))
    is_whole = image.size == (crop.original.width, crop.original.height)
    steps = block_steps(_center(image)) if is_whole and crop.resized.width > BLOCKS_SCALE * image.width else 0.0
    return ImageMeasures(
        subject, subject.example.digest, likeness_of(inner), exposure_of(inner),
        _rescaled(borders, crop.original.width / scaled.width),
        edge_blur(np.asarray(inner.convert("L"))), quality_of(path), steps, corners_of(scaled),
        thumb_of(subject.example, image) if with_thumb else None,
    )  # fmt: skip


def measure_images(subjects: Sequence[CheckedImage], with_thumbs: bool = True) -> Iterator[ImageMeasures]:
    """Yield the measures of each image in order. Two images are read at a time, and few results are held in memory."""
    remaining = iter(subjects)
    with ThreadPoolExecutor(WORKERS) as pool:
        queue = deque(pool.submit(measure_image, subject, with_thumbs) for subject in islice(remaining, 2 * WORKERS))
        while queue:
            measured = queue.popleft().result()
            queue.extend(pool.submit(measure_image, subject, with_thumbs) for subject in islice(remaining, 1))
            yield measured


def thumb_of(example: Example, image: Image.Image | None = None) -> Thumb:
    """Return thumbnails of an image and its mask. Reads the file unless `image` is given."""
    image = image or read_rgb(example.image, Size(2 * THUMB_PX, 2 * THUMB_PX))
    shrink = min(1.0, THUMB_PX / max(image.size))
    size = max(1, round(image.width * shrink)), max(1, round(image.height * shrink))
    small = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)
    written = io.BytesIO()
    small.save(written, "JPEG", quality=THUMB_QUALITY, optimize=True)
    mask = None
    with suppress(Refused):  # unusable masks are reported when the dataset is read
        found = read_mask(example.image, example.mask) if example.mask else None
        if found:
            masked = io.BytesIO()
            found.resize(size, Image.Resampling.BOX).save(masked, "PNG")
            mask = masked.getvalue()
    return Thumb(written.getvalue(), mask)


def _borders(image: Image.Image) -> Borders:
    """Find borders in a reduced copy, which is enough for bars of 1 % of a side."""
    shrink = max(1, max(image.size) // BORDERS_PX)
    found = borders_of(np.asarray(image.reduce(shrink) if shrink > 1 else image))
    return _rescaled(found, shrink)


def _rescaled(borders: Borders, scale: float) -> Borders:
    if not borders or scale == 1:
        return borders
    return replace(
        borders, left=round(borders.left * scale), top=round(borders.top * scale),
        right=round(borders.right * scale), bottom=round(borders.bottom * scale),
    )  # fmt: skip


def _center(image: Image.Image) -> np.ndarray:
    """Return the center of an image in gray, at most 1024² pixels: JPEG blocks look the same everywhere."""
    left, top = max(0, image.width - BLOCKS_PX) // 2, max(0, image.height - BLOCKS_PX) // 2
    box = (left, top, min(image.width, left + BLOCKS_PX), min(image.height, top + BLOCKS_PX))
    return np.asarray(image.crop(box).convert("L"))
