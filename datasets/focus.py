"""Where in a picture the eye goes: what a crop should keep, as a map of weights.

Faces are found by OpenCV's Haar cascade (Viola and Jones 2001), which comes with the extra [faces]; else, and where
there is no face, what stands out of its surroundings is weighed, by the spectral residual (Hou and Zhang 2007).
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import UNAVAILABLE

from .reading.images import Size, read_rgb
from .reading.masks import read_mask

MAP_PX = 64  # Hou and Zhang's scale: of an object, not of its texture
FLAT = 1 / 255
FACE_PX = 400  # longest side in which faces are looked for
LEAST_FACE = 0.06  # of the longest side: smaller finds are mostly no faces


def focus_map(image: Path, mask: Path | None, faces: bool) -> np.ndarray:
    """Weights (h, w) over an upright picture, any size, at least 0: its mask, else its faces, else what stands out."""
    if mask and (shown := read_mask(image, mask)):
        return np.asarray(shown.resize(_within(shown.size, MAP_PX), Image.Resampling.BOX), dtype=np.float64)
    picture = read_rgb(image, Size(FACE_PX, FACE_PX))
    if faces:
        found = face_map(picture)
        if found.any():
            return found
    return saliency(picture)


def saliency(picture: Image.Image) -> np.ndarray:
    """The spectral residual (Hou and Zhang 2007, eq. 2 to 4) of the picture at 64 px: (h, w), its sum 1.

    The log spectrum less its own local mean is what is unlike most pictures; brought back, it lies on the things.
    Zero for a flat picture.
    """
    grey = np.asarray(picture.convert("L").resize((MAP_PX, MAP_PX), Image.Resampling.BOX), dtype=np.float64) / 255
    if grey.std() < FLAT:
        return np.zeros_like(grey)
    spectrum = np.fft.fft2(grey)
    log_amplitude = np.log(np.abs(spectrum) + 1e-3)
    residual = log_amplitude - _mean3(log_amplitude)
    found = np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2
    for _ in range(4):  # about a Gaussian of 2.5 px, as the paper smooths
        found = _mean3(_mean3(found))
    found -= found.min()
    return found / found.sum()


def face_map(picture: Image.Image) -> np.ndarray:
    """Faces as bumps of their own size, (h, w); zero where there is none."""
    small = picture.convert("L")
    small.thumbnail((FACE_PX, FACE_PX))
    grey = np.asarray(small)
    weights = np.zeros(grey.shape)
    least = max(20, round(LEAST_FACE * max(small.size)))
    rows, columns = np.mgrid[: grey.shape[0], : grey.shape[1]]
    for left, top, width, height in _cascade().detectMultiScale(grey, 1.15, 5, minSize=(least, least)):
        across, down = (columns - left - width / 2) / width, (rows - top - height / 2) / height
        weights += width * height * np.exp(-2 * (across**2 + down**2))
    return weights


def best_share(weights: np.ndarray, original: Size, target: Size) -> float:
    """The share of what is cut that goes off the left (or top), so that the crop keeps the most weight; 0.5 for none.

    Of places that keep equally much, the one with the kept weight nearest to its middle is taken, then the middle one.
    """
    across = original.width * target.height > target.width * original.height
    line = weights.sum(0 if across else 1)
    length = (original.width, original.height)[not across]
    kept = target.width / target.height * original.height if across else target.height / target.width * original.width
    if line.sum() <= 0 or kept >= length:
        return 0.5
    window = kept / length * len(line)
    before = np.concatenate([[0.0], np.cumsum(line)])
    moment = np.concatenate([[0.0], np.cumsum(line * (np.arange(len(line)) + 0.5))])
    places = np.arange(len(line) + 1)
    starts = np.linspace(0, len(line) - window, 201)
    weight = np.interp(starts + window, places, before) - np.interp(starts, places, before)
    mean = (np.interp(starts + window, places, moment) - np.interp(starts, places, moment)) / np.maximum(weight, 1e-12)
    off_centre = np.abs(mean - starts - window / 2) / len(line)
    score = weight / line.sum() - 1e-2 * off_centre - 1e-4 * np.abs(np.linspace(-1, 1, len(starts)))
    return float(np.argmax(score)) / (len(starts) - 1)


def _mean3(values: np.ndarray) -> np.ndarray:
    """Mean over 3x3, the borders going round as a spectrum's do."""
    rows = (np.roll(values, 1, 0) + values + np.roll(values, -1, 0)) / 3
    return (np.roll(rows, 1, 1) + rows + np.roll(rows, -1, 1)) / 3


def _within(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


@lru_cache(maxsize=1)
def _cascade() -> Any:
    """OpenCV's frontal faces. Raises `Refused` (69) where it is not installed."""
    try:
        import cv2
        import cv2.data
    except ImportError:
        raise Refused(
            "--crop faces needs OpenCV: pip install 'scumble[faces]', or take --crop focus", UNAVAILABLE
        ) from None
    return cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / "haarcascade_frontalface_default.xml"))
