"""Reads image files as upright RGB images, and describes the crops that training takes of them."""

import hashlib
import threading
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, UnidentifiedImageError

from scumble.configs.errors import Refused

from .color import alpha_of, to_rgb

HEIC_SUFFIXES = {".heic", ".heif", ".hif"}
SUFFIXES = HEIC_SUFFIXES | {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif",
}  # fmt: skip
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF")  # no others: files are untrusted
OTHER_FORMATS = {
    b"8BPS": "a Photoshop file", b"%PDF": "a PDF", b"PK\3\4": "a zip archive", b"<svg": "an SVG drawing",
    b"<?xml": "an XML file", b"<!DO": "a web page", b"<htm": "a web page", b"\xff\x0a": "a JPEG XL image",
    b"\0\0\0\x0cJXL": "a JPEG XL image", b"vers": "a Git LFS pointer instead of the image",
}  # fmt: skip

MAX_PIXELS = 300_000_000  # three times a 100 MP camera; 1.2 GB as RGBA, so that a decompression bomb cannot fill memory
ONE_AT_A_TIME = 40_000_000  # pixels: larger images are decoded one at a time
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip

T = TypeVar("T")
ORIENTATION = 0x0112
OVERSAMPLING = 3  # an image reduced to at least this many times the target size gives the same result after Lanczos
REDUCIBLE_MODES = ("L", "LA", "RGB", "RGBA", "CMYK")

warnings.filterwarnings("ignore", module=r"PIL\.")  # on broken metadata of intact images; other problems raise
_large_image = threading.Lock()


@dataclass(frozen=True)
class Size:
    """Width and height in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def pixels(self) -> int:
        return self.width * self.height


@dataclass(frozen=True)
class Crop:
    """How an image is fitted to a bucket: resized to `resized`, cropped at (`left`, `top`) to `target`, then mirrored.

    `left` is measured before mirroring.
    """

    original: Size
    resized: Size
    left: int
    top: int
    target: Size
    mirrored: bool = False

    @property
    def cut(self) -> float:
        """The share of the image's pixels outside the crop."""
        return 1 - self.target.pixels / self.resized.pixels

    @property
    def is_enlarged(self) -> bool:
        return self.resized.pixels > self.original.pixels

    @property
    def corner(self) -> tuple[int, int]:
        """Left and top of the crop in the resized image, measured after mirroring."""
        return (self.resized.width - self.target.width - self.left if self.mirrored else self.left), self.top


def read_size(path: Path) -> Size:
    """Read the size of the upright image from the file header. Raises `Refused` naming a file that is not an image."""
    with _opened(path) as image:
        width, height = image.size
        metadata_first = image.format == "PNG" and not _has_late_metadata(path)  # else Pillow decodes the pixels for it
        exif = Image.Image.getexif if metadata_first else type(image).getexif
        is_turned = image.format != "TIFF" and _orientation(image, exif) >= 5  # Pillow reports a TIFF's size upright
        return Size(height, width) if is_turned else Size(width, height)


def read_rgb(path: Path, at_least: Size | None = None) -> Image.Image:
    """Read an image upright in 8-bit sRGB, with transparency over white; of an animation, the first frame.

    To save memory and time, a JPEG or an image over 40 million pixels may be reduced by an integer factor while it
    stays larger than `at_least`. Raises `Refused` naming a file whose pixels cannot be decoded, and why.
    """
    return read_image(path, lambda image: to_rgb(_reduced(image, at_least)), at_least)


def read_alpha(path: Path) -> Image.Image | None:
    """Return the upright alpha channel ("L", 255: opaque), or None if every pixel is opaque."""
    alpha = read_image(path, lambda image: alpha_of(image) or Image.new("L", image.size, 255))
    return None if alpha.getextrema()[0] == 255 else alpha


def check_pixels(path: Path) -> str:
    """Return why an image cannot be decoded, or "". Decodes all pixels, those of a JPEG at an eighth of the size."""
    try:
        read_image(path, _check_convertible, Size(1, 1))
    except Refused as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


def digest_of_file(path: Path) -> str:
    """Return the BLAKE2b hash of a file, 40 hex digits. Raises `Refused` naming a file that cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()
    except OSError as error:
        raise Refused(
            f"{path}: can no longer be read ({error.strerror or error}); restore it, or start a new run without it"
        ) from None


def read_image(path: Path, read: Callable[[Image.Image], T], at_least: Size | None = None) -> T:
    """Return `read(image)` of the decoded, upright image. Raises `Refused` as `read_rgb` does."""
    with _opened(path) as image:
        if at_least and image.format == "JPEG":
            is_turned = _orientation(image) >= 5
            image.draft(None, (at_least.height, at_least.width) if is_turned else (at_least.width, at_least.height))
        with _large_image if image.width * image.height > ONE_AT_A_TIME else nullcontext():
            image.load()
            transpose = TRANSPOSES.get(_orientation(image))
            return read(image if transpose is None else image.transpose(transpose))


def center_crop(original: Size, target: Size) -> Crop:
    """Resize the image to just cover `target`, then crop the center."""
    return crop_at(original, target, 0.5)


def crop_at(original: Size, target: Size, share: float, mirrored: bool = False) -> Crop:
    """Return the crop with `share` of the excess cut from the left (or top), and the rest from the other side."""
    scale = max(target.width / original.width, target.height / original.height)
    resized = Size(max(target.width, round(original.width * scale)), max(target.height, round(original.height * scale)))
    left, top = (resized.width - target.width) * share, (resized.height - target.height) * share
    return Crop(original, resized, int(left), int(top), target, mirrored)


def resized(image: Image.Image, crop: Crop, target: Size, resampling: Image.Resampling) -> Image.Image:
    """Return the cropped part of an upright image, decoded at any size, resized to `target`."""
    x_scale, y_scale = image.width / crop.resized.width, image.height / crop.resized.height
    box = (
        crop.left * x_scale,
        crop.top * y_scale,
        min((crop.left + crop.target.width) * x_scale, image.width),
        min((crop.top + crop.target.height) * y_scale, image.height),
    )
    part = image.resize((target.width, target.height), resampling, box)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.mirrored else part


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Return Pillow's names of the supported formats; HEIF only if the extra [heic] is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


@contextmanager
def _opened(path: Path) -> Generator[Image.Image]:
    """Yield an open image file, not yet decoded. Any exception within the block becomes `Refused`."""
    try:
        with Image.open(path, formats=formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is over {MAX_PIXELS // 1_000_000} million pixels")
            yield image
    except Refused:
        raise
    except Exception as error:  # noqa: BLE001  (decoders raise any type for a damaged file)
        raise Refused(f"{path}: {_reason(path, error)}") from None


def _reason(path: Path, error: Exception) -> str:
    detail = " ".join(str(error).replace(str(path), path.name).split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno:
        return f"cannot be opened ({error.strerror})"
    if isinstance(error, MemoryError):
        detail = "not enough memory"
    if isinstance(error, UnidentifiedImageError):
        with path.open("rb") as file:
            start = file.read(16)
        if start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS and "HEIF" not in formats():
            return "HEIC needs pillow-heif: pip install 'scumble[heic]'"
        detail = next((f"it is {kind}" for magic, kind in OTHER_FORMATS.items() if start.startswith(magic)), "")
        detail = detail or ("unknown format or damaged header" if start else "the file is empty")
    return f"cannot be read as an image ({detail}); fix or remove it"


def _orientation(image: Image.Image, exif: Callable[[Any], Image.Exif] = lambda opened: opened.getexif()) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if it is missing or the EXIF data is damaged."""
    try:
        orientation = exif(image).get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001  (damaged metadata does not make the image unusable)
        return 1
    return orientation if orientation in TRANSPOSES else 1


def _has_late_metadata(path: Path) -> bool:
    """Whether a PNG has text or EXIF chunks after its pixels (PNG specification, 5.6). Does not decode the pixels."""
    with path.open("rb") as file:
        file.seek(8)
        pixels_seen = False
        while len(header := file.read(8)) == 8:
            kind = header[4:]
            if pixels_seen and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            pixels_seen = pixels_seen or kind == b"IDAT"
            file.seek(int.from_bytes(header[:4], "big") + 4, 1)
    return False


def _reduced(image: Image.Image, at_least: Size | None) -> Image.Image:
    """Reduce a huge image by averaging square blocks of pixels."""
    if at_least is None or image.width * image.height <= ONE_AT_A_TIME or image.mode not in REDUCIBLE_MODES:
        return image
    factor = min(image.width // at_least.width, image.height // at_least.height)
    if factor < 2:
        return image
    smaller = image.reduce(factor)
    smaller.info = image.info
    return smaller


def _check_convertible(image: Image.Image) -> None:
    """Fail exactly if `to_rgb` would, without converting all of a large image."""
    plain = image.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK")
    to_rgb(image.resize((16, 16), Image.Resampling.NEAREST) if plain else image)
