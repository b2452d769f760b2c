"""Picture files -> upright RGB pictures, and the crop of each that training sees."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from scumble.configs.errors import Refused

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}


@dataclass(frozen=True)
class Size:
    """Width and height in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Crop:
    """How a picture is brought to a bucket: resized to `resized`, then cut at (`left`, `top`) to `target`."""

    original: Size
    resized: Size
    left: int
    top: int
    target: Size


def read_size(path: Path) -> Size:
    """Size of the upright picture, its pixels decoded once. Raises `Refused` naming a file that cannot be read."""
    return Size(*read_rgb(path).size)


def check_pixels(path: Path) -> str:
    """Why a file cannot be used as a picture, or nothing: its pixels are decoded once."""
    try:
        read_rgb(path)
    except Refused as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


def read_rgb(path: Path) -> Image.Image:
    """The picture turned upright by its EXIF tag, transparency laid over white, as 8-bit RGB."""
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise Refused(f"{path}: cannot be read as a picture ({error}); mend it or take it out") from None


def centre_crop(original: Size, target: Size) -> Crop:
    """Resize so that the picture just covers `target`, then cut its middle."""
    scale = max(target.width / original.width, target.height / original.height)
    resized = Size(max(target.width, round(original.width * scale)), max(target.height, round(original.height * scale)))
    return Crop(original, resized, (resized.width - target.width) // 2, (resized.height - target.height) // 2, target)


def cropped(path: Path, crop: Crop) -> torch.Tensor:
    """RGB in [-1, 1], (3, H, W) of the crop's target size."""
    picture = read_rgb(path).resize((crop.resized.width, crop.resized.height), Image.Resampling.LANCZOS)
    box = (crop.left, crop.top, crop.left + crop.target.width, crop.top + crop.target.height)
    pixels = torch.from_numpy(np.asarray(picture.crop(box)).copy())
    return pixels.permute(2, 0, 1).float() / 127.5 - 1
