"""Picture files -> upright RGB pictures, and the crop of each that training sees."""

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
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF")  # no other decoder is let near a file
OTHER_KINDS = {
    b"8BPS": "a Photoshop file", b"%PDF": "a PDF", b"PK\3\4": "a zip archive", b"<svg": "an SVG drawing",
    b"<?xml": "an XML file", b"<!DO": "a web page", b"<htm": "a web page", b"\xff\x0a": "a JPEG XL picture",
    b"\0\0\0\x0cJXL": "a JPEG XL picture", b"vers": "a pointer of Git LFS instead of the picture",
}  # fmt: skip

MAX_PIXELS = 300_000_000  # three times a 100 MP camera; as RGBA 1.2 GB, so a bomb of a few bytes cannot fill memory
ONE_AT_A_TIME = 40_000_000  # pixels: larger pictures are not decoded beside each other
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip

T = TypeVar("T")
ORIENTATION = 0x0112
ENOUGH = 3  # a picture reduced to no less than this many times what is wanted is the same after Lanczos
REDUCED_MODES = ("L", "LA", "RGB", "RGBA", "CMYK")

warnings.filterwarnings("ignore", module=r"PIL\.")  # of broken remarks in whole pictures; what matters is an error
_large = threading.Lock()


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
    """How a picture is brought to a bucket: resized to `resized`, cut at (`left`, `top`) to `target`, then mirrored.

    `left` counts in the picture as it is, before it is mirrored.
    """

    original: Size
    resized: Size
    left: int
    top: int
    target: Size
    mirrored: bool = False

    @property
    def cut(self) -> float:
        """Share of the picture's pixels that the crop leaves out."""
        return 1 - self.target.pixels / self.resized.pixels

    @property
    def is_enlarged(self) -> bool:
        return self.resized.pixels > self.original.pixels

    @property
    def corner(self) -> tuple[int, int]:
        """Left and top of what is seen, in the resized picture as it is seen: mirrored or not."""
        return (self.resized.width - self.target.width - self.left if self.mirrored else self.left), self.top


def read_size(path: Path) -> Size:
    """Size of the upright picture, from the file's header. Raises `Refused` naming a file that is no picture."""
    with _opened(path) as picture:
        width, height = picture.size
        told_before = picture.format == "PNG" and not _tells_behind(path)  # else Pillow decodes it to get there
        exif = Image.Image.getexif if told_before else type(picture).getexif
        turned = picture.format != "TIFF" and _orientation(picture, exif) >= 5  # Pillow gives a TIFF's size upright
        return Size(height, width) if turned else Size(width, height)


def read_rgb(path: Path, at_least: Size | None = None) -> Image.Image:
    """The picture upright in 8-bit sRGB, transparency laid over white; of an animation, the first frame.

    A JPEG, and any picture over 40 million pixels, may come smaller by a whole factor where it stays larger than
    `at_least`, which saves memory and time. Raises `Refused` naming a file whose pixels cannot be decoded, and why.
    """
    return read_image(path, lambda picture: to_rgb(_reduced(picture, at_least)), at_least)


def read_alpha(path: Path) -> Image.Image | None:
    """The upright alpha channel ("L", 255: opaque), or nothing where every pixel is opaque."""
    alpha = read_image(path, lambda picture: alpha_of(picture) or Image.new("L", picture.size, 255))
    return None if alpha.getextrema()[0] == 255 else alpha


def check_pixels(path: Path) -> str:
    """Why a file cannot be used as a picture, or nothing: its pixels are decoded once, a JPEG's at an eighth."""
    try:
        read_image(path, _convertible, Size(1, 1))
    except Refused as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


def digest_of_file(path: Path) -> str:
    """BLAKE2b of a file's bytes, 40 hex digits. Raises `Refused` naming a file that cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()
    except OSError as error:
        raise Refused(
            f"{path}: cannot be read any more ({error.strerror or error}); restore it, or start again without it"
        ) from None


def read_image(path: Path, read: Callable[[Image.Image], T], at_least: Size | None = None) -> T:
    """What `read` makes of the decoded, upright picture. Raises `Refused` as `read_rgb` does."""
    with _opened(path) as picture:
        if at_least and picture.format == "JPEG":
            turned = _orientation(picture) >= 5
            picture.draft(None, (at_least.height, at_least.width) if turned else (at_least.width, at_least.height))
        with _large if picture.width * picture.height > ONE_AT_A_TIME else nullcontext():
            picture.load()
            turn = TURNS.get(_orientation(picture))
            return read(picture if turn is None else picture.transpose(turn))


def center_crop(original: Size, target: Size) -> Crop:
    """Resize so that the picture just covers `target`, then cut its middle."""
    return crop_at(original, target, 0.5)


def crop_at(original: Size, target: Size, share: float, mirrored: bool = False) -> Crop:
    """The crop that leaves `share` of what is cut on its left (or top), and the rest on its other side."""
    scale = max(target.width / original.width, target.height / original.height)
    resized = Size(max(target.width, round(original.width * scale)), max(target.height, round(original.height * scale)))
    left, top = (resized.width - target.width) * share, (resized.height - target.height) * share
    return Crop(original, resized, int(left), int(top), target, mirrored)


def resized(picture: Image.Image, crop: Crop, target: Size, resampling: Image.Resampling) -> Image.Image:
    """The cropped part of an upright picture of any size, brought to `target`."""
    across, down = picture.width / crop.resized.width, picture.height / crop.resized.height
    box = (
        crop.left * across,
        crop.top * down,
        min((crop.left + crop.target.width) * across, picture.width),
        min((crop.top + crop.target.height) * down, picture.height),
    )
    part = picture.resize((target.width, target.height), resampling, box)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.mirrored else part


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read; HEIF only where the extra [heic] is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


@contextmanager
def _opened(path: Path) -> Generator[Image.Image]:
    """An open picture file, its pixels not yet decoded; whatever goes wrong with it in the block is a refusal."""
    try:
        with Image.open(path, formats=formats()) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width}x{picture.height} is over {MAX_PIXELS // 1_000_000} million pixels")
            yield picture
    except Refused:
        raise
    except Exception as error:  # noqa: BLE001  (decoders raise anything at all from a damaged file)
        raise Refused(f"{path}: {_reason(path, error)}") from None


def _reason(path: Path, error: Exception) -> str:
    detail = " ".join(str(error).replace(str(path), path.name).split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno:
        return f"cannot be opened ({error.strerror})"
    if isinstance(error, MemoryError):
        detail = "it needs more memory than there is"
    if isinstance(error, UnidentifiedImageError):
        with path.open("rb") as file:
            start = file.read(16)
        if start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS and "HEIF" not in formats():
            return "HEIC needs pillow-heif: pip install 'scumble[heic]'"
        detail = next((f"it is {kind}" for mark, kind in OTHER_KINDS.items() if start.startswith(mark)), "")
        detail = detail or ("it is of no kind that is known, or its start is damaged" if start else "it is empty")
    return f"cannot be read as a picture ({detail}); mend it or take it out"


def _orientation(picture: Image.Image, exif: Callable[[Any], Image.Exif] = lambda opened: opened.getexif()) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none or the EXIF data are damaged."""
    try:
        orientation = exif(picture).get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001  (the picture is whole where its remarks are not)
        return 1
    return orientation if orientation in TURNS else 1


def _tells_behind(path: Path) -> bool:
    """Whether a PNG has text or EXIF data behind its pixels (PNG specification, 5.6); pixels are passed over."""
    with path.open("rb") as file:
        file.seek(8)
        pixels_seen = False
        while len(head := file.read(8)) == 8:
            kind = head[4:]
            if pixels_seen and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            pixels_seen = pixels_seen or kind == b"IDAT"
            file.seek(int.from_bytes(head[:4], "big") + 4, 1)
    return False


def _reduced(picture: Image.Image, at_least: Size | None) -> Image.Image:
    """A huge picture as means of square blocks of its pixels."""
    if at_least is None or picture.width * picture.height <= ONE_AT_A_TIME or picture.mode not in REDUCED_MODES:
        return picture
    factor = min(picture.width // at_least.width, picture.height // at_least.height)
    if factor < 2:
        return picture
    smaller = picture.reduce(factor)
    smaller.info = picture.info
    return smaller


def _convertible(picture: Image.Image) -> None:
    """Fails where `to_rgb` would, without converting all of a large picture."""
    plain = picture.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK")
    to_rgb(picture.resize((16, 16), Image.Resampling.NEAREST) if plain else picture)
