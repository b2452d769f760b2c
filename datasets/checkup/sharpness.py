"""Measures the blur of the sharpest edges of an image, in pixels, independently of its content.

An edge of blur σ, blurred again by σ₀, keeps the share 1 / R of its gradient, with R = sqrt(1 + σ₀² / σ²), so that
σ = σ₀ / sqrt(R² - 1) (Zhuo & Sim 2011, "Defocus map estimation from a single image", equations 3 to 5). Of the
strongest edges, the sharper quarter counts: a sharp subject on a soft background is sharp.
"""

import numpy as np

REBLUR_PX = 1.0  # σ₀
DETECTION_PX = 1.5  # blur for finding edges, which suppresses noise and JPEG blocks
EDGES = 0.01  # share of pixels
SHARPER = 75  # percentile of the gradient ratio
MAX_BLUR_PX = 20.0
FACTORS = (2, 4)
MIN_SIDE_PX = 48  # side of a reduced image
SOFT_REDUCED_PX = 1.5  # sharp images are not this soft at reduced size


def edge_blur(gray: np.ndarray) -> float:
    """Return the blur σ in pixels of the sharper edges of a gray image (H, W); about 0.5 for the sharpest images.

    A strong blur leaves slopes below one level per pixel, which 8 bits cannot represent, so it is measured on the image
    reduced by 2 and 4.
    """
    gray = gray.astype(np.float32)
    found = _edge_blur(gray)
    for factor in FACTORS:
        if min(gray.shape) >= MIN_SIDE_PX * factor and (blur := _edge_blur(_reduced(gray, factor))) > SOFT_REDUCED_PX:
            found = max(found, factor * blur)
    return min(MAX_BLUR_PX, found)


def _edge_blur(gray: np.ndarray) -> float:
    if min(gray.shape) < 8:
        return 0.0
    once = blurred(gray, REBLUR_PX)
    smoothed = gradient(blurred(once, (DETECTION_PX**2 - REBLUR_PX**2) ** 0.5)).ravel()
    count = max(32, int(EDGES * smoothed.size))
    strongest = np.argpartition(smoothed, -count)[-count:] if count < smoothed.size else np.arange(smoothed.size)
    before, after = gradient(gray).ravel()[strongest], gradient(once).ravel()[strongest]
    is_edge = after > 0.1  # of 255: an image without edges has no blur
    if not is_edge.any():
        return 0.0
    ratio = float(np.percentile(before[is_edge] / after[is_edge], SHARPER))
    return min(MAX_BLUR_PX, REBLUR_PX / max(ratio**2 - 1, 1e-6) ** 0.5)


def blurred(gray: np.ndarray, sigma_px: float) -> np.ndarray:
    """Apply a Gaussian blur, with the border values extended outward."""
    radius = int(3 * sigma_px + 1)
    kernel = np.exp(-(np.arange(-radius, radius + 1, dtype=np.float32) ** 2) / (2 * sigma_px**2))
    kernel /= kernel.sum()
    for _ in range(2):
        padded = np.pad(gray, ((radius, radius), (0, 0)), mode="edge")
        total = kernel[0] * padded[: len(gray)]
        for offset, weight in enumerate(kernel[1:], 1):
            total += weight * padded[offset : offset + len(gray)]
        gray = np.ascontiguousarray(total.T)
    return gray


def gradient(gray: np.ndarray) -> np.ndarray:
    """Return the gradient magnitude per pixel by Roberts cross, (H - 1, W - 1)."""
    falling, rising = gray[1:, 1:] - gray[:-1, :-1], gray[1:, :-1] - gray[:-1, 1:]
    return np.sqrt((falling * falling + rising * rising) / 2)


def _reduced(gray: np.ndarray, factor: int) -> np.ndarray:
    """Reduce an image by an integer factor, averaging squares of pixels."""
    height, width = gray.shape[0] // factor, gray.shape[1] // factor
    return gray[: height * factor, : width * factor].reshape(height, factor, width, factor).mean((1, 3))
