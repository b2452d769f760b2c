"""Loss masks, white (counts fully) to black (does not count), from mask files or an image's alpha channel.

Mask files are in a folder `masks/` next to the images, under the same names, or are called NAME-masklabel.png.
"""

import math
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from scumble.configs.errors import Refused

from .color import to_rgb
from .images import read_alpha, read_image, read_size
from .sidecars import folded

MASK_ENDING = "-masklabel"
ASPECT_TOLERANCE = 0.02


class MaskFiles:
    """Finds the mask of an image among mask files: `a.png`, `a-masklabel.png` or `a.jpg.png`."""

    def __init__(self, paths: Iterable[Path]):
        self.by_name = {_stem(path): path for path in paths}

    def find(self, image: Path) -> Path | None:
        return self.by_name.get(folded(image.name)) or self.by_name.get(folded(image.stem))


def read_mask(image: Path, mask: Path) -> Image.Image | None:
    """Return the upright mask ("L", 255: counts), or None if it is fully white. Transparent areas are black.

    If `mask` is the image itself, its alpha channel is the mask. Raises `Refused` naming a mask that cannot be used.
    """
    if mask == image:
        found = read_alpha(image)
    else:
        found = read_image(mask, lambda opened: to_rgb(_without_profile(opened), "black").convert("L"))
    if found is None:
        return None
    darkest, brightest = found.getextrema()
    if brightest == 0:
        problem = "is fully transparent" if mask == image else "is fully black"
        raise Refused(f"{mask}: {problem}, so no part of the image would count; fix or remove it")
    return None if darkest == 255 else found


def mask_hides_pixels(image: Path, mask: Path) -> bool:
    """Return whether a mask hides any part of its image. Raises `Refused` naming a mask that cannot be used."""
    found, size = read_mask(image, mask), read_size(image)
    if found and abs(math.log(found.width * size.height / (found.height * size.width))) > ASPECT_TOLERANCE:
        shape = f"{found.width}x{found.height}"
        raise Refused(f"{mask}: is {shape}, but the image is {size}; draw the mask with the aspect ratio of the image")
    return found is not None


def _stem(path: Path) -> str:
    return folded(path.stem).removesuffix(MASK_ENDING)


def _without_profile(mask: Image.Image) -> Image.Image:
    """Drop the ICC profile: the gray levels of a mask are weights, not colors."""
    mask.info.pop("icc_profile", None)
    return mask
