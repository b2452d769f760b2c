"""Crops and masks as the tensors that training sees. What lies before this, a check-up too, needs no torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from scumble.configs.errors import Refused

from .crops import CroppedExample
from .reading.images import ENOUGH, Crop, Size, read_rgb, resized
from .reading.masks import read_mask


def cropped(path: Path, crop: Crop) -> torch.Tensor:
    """RGB in [-1, 1], (3, H, W) of the crop's target size."""
    return next(all_cropped(path, [crop]))


def all_cropped(path: Path, crops: Sequence[Crop]) -> Iterator[torch.Tensor]:
    """Each crop of a picture, as `cropped` gives it; the file is decoded once.

    Only the part that is kept is resized (Lanczos), so that a strip of 1x5000 pixels does not become a million high.
    """
    widest, highest = max(crop.resized.width for crop in crops), max(crop.resized.height for crop in crops)
    picture = read_rgb(path, Size(ENOUGH * widest, ENOUGH * highest))
    for crop in crops:
        pixels = torch.from_numpy(np.asarray(resized(picture, crop, crop.target, Image.Resampling.LANCZOS)).copy())
        yield pixels.permute(2, 0, 1).float() / 127.5 - 1


def masks_of(view: CroppedExample, latent_px: int, floor: float) -> tuple[torch.Tensor, ...]:
    """Masks (H, W) over a view's latents, as `cropped_masks` gives them, for each of its crops; none where it has none.

    They stay in memory for a whole run: bytes are a quarter of the weights that `mask_weights` makes of them. Raises
    `Refused` naming a picture in whose crop nothing counts.
    """
    image, mask = view.example.image, view.example.mask
    if mask is None:
        return ()
    size = Size(view.size.width // latent_px, view.size.height // latent_px)
    masks = cropped_masks(image, mask, view.crops, size)
    if floor == 0 and not all(one.any() for one in masks):
        raise Refused(
            f"{image}: its mask is black in the crop that is seen; widen it, take --crop focus, or --masks off"
        )
    return tuple(masks)


def cropped_masks(image: Path, mask: Path, crops: Sequence[Crop], size: Size) -> list[torch.Tensor]:
    """How much each part of each crop counts, (H, W) of `size` (of the latents, say), 0 to 255: means over areas."""
    picture = read_mask(image, mask)
    if picture is None:
        return [torch.full((size.height, size.width), 255, dtype=torch.uint8) for _ in crops]
    parts = [resized(picture, crop, size, Image.Resampling.BOX) for crop in crops]
    return [torch.from_numpy(np.asarray(part).copy()) for part in parts]


def mask_weights(mask: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
    """Weights of mean 1 from a mask (H, W) from 0 to 255, whose black parts weigh `floor` beside 1.

    The mean of a weighted loss is then the mean over what counts, however small that is. Raises ValueError for a mask
    that is black all over.
    """
    lifted = floor + (1 - floor) * (mask.float() / 255)
    mean = lifted.mean()
    if mean <= 0:
        raise ValueError("a mask that is black all over")
    return lifted / mean
