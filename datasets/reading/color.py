"""Converts any image file's colors to 8-bit sRGB: palettes, grayscale, CMYK, LAB, 16 bits, ICC profiles, alpha."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
SIXTEEN_BIT = {"I;16", "I;16L", "I;16B", "I;16N"}
WITH_ALPHA = {"RGBA", "RGBa", "LA", "La", "PA"}


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Return the image in sRGB, with transparent areas composited over `background`.

    Colors are converted with the image's ICC profile (relative colorimetric with black point compensation, as in
    browsers). A profile that LittleCMS cannot use is ignored, as image viewers do. Raises ValueError for pixel values
    that have no 8-bit equivalent.
    """
    profile = image.info.get("icc_profile") or b""
    alpha = alpha_of(image)
    image = _to_eight_bits(image)
    if image.mode in WITH_ALPHA or image.mode == "P":
        image = image.convert("LA" if image.mode in ("LA", "La") else "RGBA")
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("L" if image.mode in ("LA", "1") else "RGB")
    transform = _transform(profile, image.mode)
    converted = ImageCms.applyTransform(image, transform) if transform else image.convert("RGB")
    assert converted is not None  # only an in-place transform returns None
    if alpha is None:
        return converted
    composited = Image.new("RGB", converted.size, background)
    composited.paste(converted, mask=alpha)
    return composited


def alpha_of(image: Image.Image) -> Image.Image | None:
    """Return the 8-bit alpha channel (255: opaque), or None if the image has no transparency."""
    if image.mode in WITH_ALPHA:
        return image.getchannel(image.getbands()[-1])
    transparent = image.info.get("transparency")
    if transparent is None:
        return None
    if image.mode in SIXTEEN_BIT or image.mode == "I":
        return Image.fromarray(np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8))
    if image.mode in ("1", "L", "P", "RGB"):
        return image.convert("RGBA").getchannel("A")
    return None


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and floating-point grayscale to 0..255; return other modes unchanged."""
    if image.mode in SIXTEEN_BIT:
        return Image.fromarray(_scaled(np.asarray(image), 65535))
    if image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0:
            raise ValueError("negative pixel values: save it with 8 or 16 bits")
        return Image.fromarray(_scaled(values, 65535 if values.max() <= 65535 else 2**31 - 1))
    if image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise ValueError("floating-point values outside 0 to 1: save it with 8 or 16 bits")
        return Image.fromarray(_scaled(values, 1))
    return image


def _scaled(values: np.ndarray, white: int) -> np.ndarray:
    return np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8)


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform to sRGB, or None if the profile is broken or does not match the channels of `mode`."""
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
