"""How soft a picture's sharpest edges are, in pixels: the blur that an edge shows, whatever the picture holds.

An edge of blur σ, blurred once more by σ₀, loses the share 1 / R of its gradient with R = sqrt(1 + σ₀² / σ²), so that
σ = σ₀ / sqrt(R² - 1) (Zhuo & Sim 2011, "Defocus map estimation from a single image", equations 3 to 5). Of the
strongest edges the sharper quarter counts: a sharp subject before a soft background is sharp.
"""

import numpy as np

AGAIN_PX = 1.0  # σ₀
STEADY_PX = 1.5  # edges are looked for at this blur, where noise and the blocks of a JPEG are faint
EDGES = 0.01  # share of pixels
SHARPER = 75  # percentile
SOFTEST_PX = 20.0
REDUCED = (2, 4)
LEAST_PX = 48  # side of a reduced picture
TELLING_PX = 1.5  # no sharp picture is as soft when it is reduced


def edge_blur(grey: np.ndarray) -> float:
    """Blur σ in pixels of the sharper edges of a grey picture (H, W); about 0.5 where every pixel is its own.

    A strong blur leaves slopes of less than a level a pixel, which eight bits cannot tell: it is measured on the
    picture reduced by 2 and 4.
    """
    grey = grey.astype(np.float32)
    found = _edge_blur(grey)
    for times in REDUCED:
        if min(grey.shape) >= LEAST_PX * times and (less := _edge_blur(_reduced(grey, times))) > TELLING_PX:
            found = max(found, times * less)
    return min(SOFTEST_PX, found)


def _edge_blur(grey: np.ndarray) -> float:
    if min(grey.shape) < 8:
        return 0.0
    once = blurred(grey, AGAIN_PX)
    steady = gradient(blurred(once, (STEADY_PX**2 - AGAIN_PX**2) ** 0.5)).ravel()
    count = max(32, int(EDGES * steady.size))
    strongest = np.argpartition(steady, -count)[-count:] if count < steady.size else np.arange(steady.size)
    before, after = gradient(grey).ravel()[strongest], gradient(once).ravel()[strongest]
    seen = after > 0.1  # of 255: a picture without edges has no blur
    if not seen.any():
        return 0.0
    ratio = float(np.percentile(before[seen] / after[seen], SHARPER))
    return min(SOFTEST_PX, AGAIN_PX / max(ratio**2 - 1, 1e-6) ** 0.5)


def blurred(grey: np.ndarray, sigma_px: float) -> np.ndarray:
    """Gaussian blur with the edges' values carried on."""
    reach = int(3 * sigma_px + 1)
    kernel = np.exp(-(np.arange(-reach, reach + 1, dtype=np.float32) ** 2) / (2 * sigma_px**2))
    kernel /= kernel.sum()
    for _ in range(2):
        padded = np.pad(grey, ((reach, reach), (0, 0)), mode="edge")
        total = kernel[0] * padded[: len(grey)]
        for place, weight in enumerate(kernel[1:], 1):
            total += weight * padded[place : place + len(grey)]
        grey = np.ascontiguousarray(total.T)
    return grey


def gradient(grey: np.ndarray) -> np.ndarray:
    """Length of the gradient by Roberts' diagonal differences, (H - 1, W - 1) per pixel."""
    falling, rising = grey[1:, 1:] - grey[:-1, :-1], grey[1:, :-1] - grey[:-1, 1:]
    return np.sqrt((falling * falling + rising * rising) / 2)


def _reduced(grey: np.ndarray, times: int) -> np.ndarray:
    """Means over squares of so many pixels each way."""
    high, wide = grey.shape[0] // times, grey.shape[1] // times
    return grey[: high * times, : wide * times].reshape(high, times, wide, times).mean((1, 3))
