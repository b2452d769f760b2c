"""Pictures -> latents, encoded once: the posterior's mean and std of each picture, all of them on the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from scumble.configs.errors import Refused
from scumble.datasets.images import Crop, all_cropped

from .models import Base


@dataclass(frozen=True)
class Latents:
    """`mean[i][c]` and `std[i][c]` are (4, H/8, W/8) fp32 of crop c of picture i."""

    mean: list[list[torch.Tensor]]
    std: list[list[torch.Tensor]]
    scale: float

    def sample(self, index: int, crop: int, noise: torch.Tensor) -> torch.Tensor:
        """A draw of the posterior, scaled as the UNet wants it."""
        return (self.mean[index][crop] + self.std[index][crop] * noise) * self.scale


@torch.no_grad()
def encode_set(
    base: Base, images: Sequence[tuple[Path, Sequence[Crop]]], tell: Callable[[int], None] = lambda done: None
) -> Latents:
    """Encode every picture with the base's VAE. Raises `Refused` where the VAE gives numbers that are not finite."""
    device, dtype = base.vae.device, base.vae.dtype
    means, stds = [], []
    for done, (path, crops) in enumerate(images):
        posteriors = [base.vae.encode(one[None].to(device, dtype)).latent_dist for one in all_cropped(path, crops)]
        mean = torch.cat([posterior.mean for posterior in posteriors]).float()
        std = torch.cat([posterior.std for posterior in posteriors]).float()
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise Refused(f"{path}: the VAE gives numbers that are not finite; name another with --vae")
        means.append(list(mean))
        stds.append(list(std))
        tell(done + 1)
    return Latents(means, stds, float(base.vae.config["scaling_factor"]))
