"""Light of a picture from its histograms: how dark, how light, how much between."""

from dataclasses import dataclass

from PIL import Image

ONE_COLOUR = 12  # levels


@dataclass(frozen=True)
class Exposure:
    """Levels from 0 to 255. `darkest` and `lightest` leave a hundredth of the pixels beyond them; `mean` is of all.

    `span` is the widest range of a channel but for a thousandth at either end, so that one colour all over spans 0.
    """

    darkest: int
    lightest: int
    mean: float
    span: int

    @property
    def is_empty(self) -> bool:
        """One colour all over, but for noise."""
        return self.span < ONE_COLOUR


def exposure_of(picture: Image.Image) -> Exposure:
    """Of an RGB picture."""
    grey = picture.convert("L").histogram()
    channels = picture.histogram()
    spans = [
        _level(channels[start : start + 256], 0.999) - _level(channels[start : start + 256], 0.001)
        for start in range(0, 768, 256)
    ]
    mean = sum(level * count for level, count in enumerate(grey)) / sum(grey)
    return Exposure(_level(grey, 0.01), _level(grey, 0.99), mean, max(spans))


def _level(histogram: list[int], share: float) -> int:
    """The level at or under which `share` of the pixels lie."""
    wanted, below = share * sum(histogram), 0
    for level, count in enumerate(histogram):
        below += count
        if below >= wanted:
            return level
    return len(histogram) - 1
