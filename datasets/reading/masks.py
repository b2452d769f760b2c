"""What of a picture counts: a mask of white (counts) to black (does not), beside the picture or as its alpha channel.

Masks lie in a folder `masks/` beside the pictures under their names, or are called NAME-masklabel.png.
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
    """The mask files of one folder by the picture that they belong to: `a.png`, `a-masklabel.png` or `a.jpg.png`."""

    def __init__(self, paths: Iterable[Path]):
        self.by_name = {_stem(path): path for path in paths}

    def of(self, image: Path) -> Path | None:
        return self.by_name.get(folded(image.name)) or self.by_name.get(folded(image.stem))


def read_mask(image: Path, mask: Path) -> Image.Image | None:
    """The upright mask ("L", 255: counts), transparency taken for black; nothing where it is white all over.

    Where `mask` is the image itself, that is its alpha channel. Raises `Refused` naming a mask that cannot be used.
    """
    if mask == image:
        picture = read_alpha(image)
    else:
        picture = read_image(mask, lambda opened: to_rgb(_without_profile(opened), "black").convert("L"))
    if picture is None:
        return None
    darkest, brightest = picture.getextrema()
    if brightest == 0:
        what = "it is transparent" if mask == image else "the mask is black"
        raise Refused(f"{mask}: {what} all over, so nothing of the picture would count; mend it or take it out")
    return None if darkest == 255 else picture


def hides(image: Path, mask: Path) -> bool:
    """Whether a mask hides anything of its picture. Raises `Refused` naming a mask that cannot be used."""
    picture, size = read_mask(image, mask), read_size(image)
    if picture and abs(math.log(picture.width * size.height / (picture.height * size.width))) > ASPECT_TOLERANCE:
        shape = f"{picture.width}x{picture.height}"
        raise Refused(f"{mask}: is {shape}, another shape than the picture's {size}; draw it over the picture")
    return picture is not None


def _stem(path: Path) -> str:
    return folded(path.stem).removesuffix(MASK_ENDING)


def _without_profile(picture: Image.Image) -> Image.Image:
    """A mask's greys are numbers, not colours."""
    picture.info.pop("icc_profile", None)
    return picture
