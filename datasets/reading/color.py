"""Whatever colours a picture file holds -> 8-bit sRGB: palettes, greys, CMYK, LAB, 16 bits, ICC profiles, alpha."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
SIXTEEN_BIT = {"I;16", "I;16L", "I;16B", "I;16N"}
WITH_ALPHA = {"RGBA", "RGBa", "LA", "La", "PA"}


def to_rgb(picture: Image.Image, background: str = "white") -> Image.Image:
    """The picture in sRGB, transparency laid over `background`.

    Colours are converted by the picture's ICC profile (relative colorimetric with black point compensation, as
    browsers do); a profile that LittleCMS cannot use is passed over, as viewers do. Raises ValueError for numbers that
    no 8-bit picture stands for.
    """
    profile = picture.info.get("icc_profile") or b""
    alpha = alpha_of(picture)
    picture = _in_eight_bits(picture)
    if picture.mode in WITH_ALPHA or picture.mode == "P":
        picture = picture.convert("LA" if picture.mode in ("LA", "La") else "RGBA")
    if picture.mode not in ("L", "RGB", "CMYK", "LAB"):
        picture = picture.convert("L" if picture.mode in ("LA", "1") else "RGB")
    transform = _transform(profile, picture.mode)
    converted = ImageCms.applyTransform(picture, transform) if transform else picture.convert("RGB")
    assert converted is not None  # only a transform in place gives nothing
    if alpha is None:
        return converted
    laid = Image.new("RGB", converted.size, background)
    laid.paste(converted, mask=alpha)
    return laid


def alpha_of(picture: Image.Image) -> Image.Image | None:
    """The alpha channel in 8 bits, 255 where the picture is opaque; nothing where the picture has none."""
    if picture.mode in WITH_ALPHA:
        return picture.getchannel(picture.getbands()[-1])
    clear = picture.info.get("transparency")
    if clear is None:
        return None
    if picture.mode in SIXTEEN_BIT or picture.mode == "I":
        return Image.fromarray(np.where(np.asarray(picture) == clear, 0, 255).astype(np.uint8))
    if picture.mode in ("1", "L", "P", "RGB"):
        return picture.convert("RGBA").getchannel("A")
    return None


def _in_eight_bits(picture: Image.Image) -> Image.Image:
    """Greys of 16 bits, 32 bits or floating point scaled to 0..255; all other modes as they are."""
    if picture.mode in SIXTEEN_BIT:
        return Image.fromarray(_scaled(np.asarray(picture), 65535))
    if picture.mode == "I":
        values = np.asarray(picture)
        if values.min() < 0:
            raise ValueError("it holds negative numbers: save it in 8 or 16 bits")
        return Image.fromarray(_scaled(values, 65535 if values.max() <= 65535 else 2**31 - 1))
    if picture.mode == "F":
        values = np.asarray(picture)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise ValueError("it holds floating-point numbers outside 0 to 1: save it in 8 or 16 bits")
        return Image.fromarray(_scaled(values, 1))
    return picture


def _scaled(values: np.ndarray, white: int) -> np.ndarray:
    return np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8)


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB; nothing where the profile is broken or is for other channels than `mode`."""
    if not profile and mode != "LAB":
        return None
    try:
        source = ImageCms.createProfile("LAB") if mode == "LAB" else io.BytesIO(profile)
        return ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(source), SRGB, mode, "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
