"""Finds the important region of an image, as a weight map for choosing the crop.

Faces are found with OpenCV's Haar cascade (Viola and Jones 2001), in the extra [faces]. Without faces, the weights are
the saliency of the spectral residual (Hou and Zhang 2007).
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

MAP_PX = 64  # Hou and Zhang's scale, at which objects stand out rather than their texture
FLAT = 1 / 255
FACE_PX = 400  # longest side of the image in which faces are detected
MIN_FACE = 0.06  # of the longest side; most smaller detections are false


def focus_map(image: Path, mask: Path | None, faces: bool) -> np.ndarray:
    """Return weights (h, w) >= 0 over the upright image: its mask, or else its faces, or else its saliency."""
    if mask and (found := read_mask(image, mask)):
        return np.asarray(found.resize(_within(found.size, MAP_PX), Image.Resampling.BOX), dtype=np.float64)
    pixels = read_rgb(image, Size(FACE_PX, FACE_PX))
    if faces:
        weights = face_map(pixels)
        if weights.any():
            return weights
    return saliency(pixels)


def saliency(image: Image.Image) -> np.ndarray:
    """Return the spectral residual (Hou and Zhang 2007, eq. 2 to 4) of the image at 64 px: (h, w), sum 1.

    The log spectrum minus its local mean is what differs from most images; transformed back, it highlights objects.
    All zeros for a flat image.
    """
    gray = np.asarray(image.convert("L").resize((MAP_PX, MAP_PX), Image.Resampling.BOX), dtype=np.float64) / 255
    if gray.std() < FLAT:
        return np.zeros_like(gray)
    spectrum = np.fft.fft2(gray)
    log_amplitude = np.log(np.abs(spectrum) + 1e-3)
    residual = log_amplitude - _mean3(log_amplitude)
    found = np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2
    for _ in range(4):  # close to the Gaussian of 2.5 px in the paper
        found = _mean3(_mean3(found))
    found -= found.min()
    return found / found.sum()


def face_map(image: Image.Image) -> np.ndarray:
    """Return weights (h, w) with a Gaussian of the face's size at each face; all zeros without faces."""
    small = image.convert("L")
    small.thumbnail((FACE_PX, FACE_PX))
    gray = np.asarray(small)
    weights = np.zeros(gray.shape)
    min_px = max(20, round(MIN_FACE * max(small.size)))
    rows, columns = np.mgrid[: gray.shape[0], : gray.shape[1]]
    for left, top, width, height in _cascade().detectMultiScale(gray, 1.15, 5, minSize=(min_px, min_px)):
        x, y = (columns - left - width / 2) / width, (rows - top - height / 2) / height
        weights += width * height * np.exp(-2 * (x**2 + y**2))
    return weights


def best_share(weights: np.ndarray, original: Size, target: Size) -> float:
    """Return the share of the excess to cut from the left (or top) so that the crop keeps the most weight.

    Of equally good positions, the one whose weight is closest to the center of the crop is chosen, then the one closest
    to the center of the image. Returns 0.5 if nothing has weight.
    """
    is_wide = original.width * target.height > target.width * original.height
    line = weights.sum(0 if is_wide else 1)
    length = (original.width, original.height)[not is_wide]
    kept = target.width / target.height * original.height if is_wide else target.height / target.width * original.width
    if line.sum() <= 0 or kept >= length:
        return 0.5
    window = kept / length * len(line)
    before = np.concatenate([[0.0], np.cumsum(line)])
    moment = np.concatenate([[0.0], np.cumsum(line * (np.arange(len(line)) + 0.5))])
    edges = np.arange(len(line) + 1)
    starts = np.linspace(0, len(line) - window, 201)
    weight = np.interp(starts + window, edges, before) - np.interp(starts, edges, before)
    mean = (np.interp(starts + window, edges, moment) - np.interp(starts, edges, moment)) / np.maximum(weight, 1e-12)
    off_center = np.abs(mean - starts - window / 2) / len(line)
    score = weight / line.sum() - 1e-2 * off_center - 1e-4 * np.abs(np.linspace(-1, 1, len(starts)))
    return float(np.argmax(score)) / (len(starts) - 1)


def _mean3(values: np.ndarray) -> np.ndarray:
    """Return the mean over 3x3 values, with wrap-around at the borders, since spectra are periodic."""
    rows = (np.roll(values, 1, 0) + values + np.roll(values, -1, 0)) / 3
    return (np.roll(rows, 1, 1) + rows + np.roll(rows, -1, 1)) / 3


def _within(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


@lru_cache(maxsize=1)
def _cascade() -> Any:
    """Load OpenCV's detector of frontal faces. Raises `Refused` (69) if OpenCV is not installed."""
    try:
        import cv2
        import cv2.data
    except ImportError:
        raise Refused(
            "--crop faces needs OpenCV: pip install 'scumble[faces]', or use --crop focus", UNAVAILABLE
        ) from None
    return cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / "haarcascade_frontalface_default.xml"))
