"""Loads crops and masks as tensors for training. Reading and checking a dataset needs no torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from scumble.configs.errors import Refused

from .crops import CroppedExample
from .reading.images import OVERSAMPLING, Crop, Size, read_rgb, resized
from .reading.masks import read_mask


def cropped(path: Path, crop: Crop) -> torch.Tensor:
    """Return RGB in [-1, 1], (3, H, W), at the target size of the crop."""
    return next(all_cropped(path, [crop]))


def all_cropped(path: Path, crops: Sequence[Crop]) -> Iterator[torch.Tensor]:
    """Yield each crop of an image, as `cropped` returns it. The file is decoded once.

    Only the part inside the crop is resized (Lanczos): a whole image of 1x5000 pixels could become a million pixels
    high.
    """
    max_width, max_height = max(crop.resized.width for crop in crops), max(crop.resized.height for crop in crops)
    image = read_rgb(path, Size(OVERSAMPLING * max_width, OVERSAMPLING * max_height))
    for crop in crops:
        pixels = torch.from_numpy(np.asarray(resized(image, crop, crop.target, Image.Resampling.LANCZOS)).copy())
        yield pixels.permute(2, 0, 1).float() / 127.5 - 1


def masks_of(cropped_example: CroppedExample, latent_px: int, floor: float) -> tuple[torch.Tensor, ...]:
    """Return the mask of each crop at latent resolution, (H, W) uint8; empty if the image has no mask.

    Masks stay in memory for the whole run; as bytes they take a quarter of the weights that `mask_weights` returns.
    Raises `Refused` naming an image whose mask is black inside a crop.
    """
    image, mask = cropped_example.example.image, cropped_example.example.mask
    if mask is None:
        return ()
    size = Size(cropped_example.size.width // latent_px, cropped_example.size.height // latent_px)
    masks = cropped_masks(image, mask, cropped_example.crops, size)
    if floor == 0 and not all(one.any() for one in masks):
        raise Refused(
            f"{image}: its mask is black inside the crop; enlarge the white area, or use --crop focus or --masks off"
        )
    return tuple(masks)


def cropped_masks(image: Path, mask: Path, crops: Sequence[Crop], size: Size) -> list[torch.Tensor]:
    """Return the mask of each crop, 0 to 255, (H, W) of `size`, averaged over areas."""
    found = read_mask(image, mask)
    if found is None:
        return [torch.full((size.height, size.width), 255, dtype=torch.uint8) for _ in crops]
    parts = [resized(found, crop, size, Image.Resampling.BOX) for crop in crops]
    return [torch.from_numpy(np.asarray(part).copy()) for part in parts]


def mask_weights(mask: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
    """Return loss weights of mean 1 from a mask (H, W) of 0 to 255. Black areas weigh `floor` times the white ones.

    The mean of the weighted loss is then the mean over the unmasked area, whatever its size. Raises ValueError for a
    mask that is fully black.
    """
    weights = floor + (1 - floor) * (mask.float() / 255)
    mean = weights.mean()
    if mean <= 0:
        raise ValueError("the mask is fully black")
    return weights / mean
