"""Measures the brightness range of an image from its histograms."""

from dataclasses import dataclass

from PIL import Image

SOLID_COLOR = 12  # levels


@dataclass(frozen=True)
class Exposure:
    """Levels from 0 to 255. `darkest` and `lightest` are the 1st and 99th percentile of gray, and `mean` is its mean.

    `span` is the widest range of a color channel without the extreme 0.1 % at either end; it is 0 for a solid color.
    """

    darkest: int
    lightest: int
    mean: float
    span: int

    @property
    def is_empty(self) -> bool:
        """Whether the image is a solid color, apart from noise."""
        return self.span < SOLID_COLOR


def exposure_of(image: Image.Image) -> Exposure:
    """Measure an RGB image."""
    gray = image.convert("L").histogram()
    channels = image.histogram()
    spans = [
        _level(channels[start : start + 256], 0.999) - _level(channels[start : start + 256], 0.001)
        for start in range(0, 768, 256)
    ]
    mean = sum(level * count for level, count in enumerate(gray)) / sum(gray)
    return Exposure(_level(gray, 0.01), _level(gray, 0.99), mean, max(spans))


def _level(histogram: list[int], share: float) -> int:
    """Return the level that `share` of the pixels do not exceed (a percentile)."""
    target, below = share * sum(histogram), 0
    for level, count in enumerate(histogram):
        below += count
        if below >= target:
            return level
    return len(histogram) - 1
