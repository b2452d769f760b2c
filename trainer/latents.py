"""Pictures -> latents, encoded once: the posterior's mean and std of each picture, all of them on the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from scumble.configs.errors import Refused
from scumble.datasets.images import Crop, cropped

from .models import Base


@dataclass(frozen=True)
class Latents:
    """`mean[i][f]` and `std[i][f]` are (4, H/8, W/8) fp32 of picture i, upright (f = 0) or mirrored (f = 1)."""

    mean: list[list[torch.Tensor]]
    std: list[list[torch.Tensor]]
    scale: float

    def sample(self, index: int, mirrored: bool, noise: torch.Tensor) -> torch.Tensor:
        """A draw of the posterior, scaled as the UNet wants it."""
        return (self.mean[index][mirrored] + self.std[index][mirrored] * noise) * self.scale


@torch.no_grad()
def encode_set(
    base: Base, images: Sequence[tuple[Path, Crop]], mirror: bool, tell: Callable[[int], None] = lambda done: None
) -> Latents:
    """Encode every picture with the base's VAE. Raises `Refused` where the VAE gives numbers that are not finite."""
    device, dtype = base.vae.device, base.vae.dtype
    means, stds = [], []
    for done, (path, crop) in enumerate(images):
        pixels = cropped(path, crop)[None]
        variants = torch.cat([pixels, pixels.flip(-1)]) if mirror else pixels
        posterior = base.vae.encode(variants.to(device, dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise Refused(f"{path}: the VAE gives numbers that are not finite; name another with --vae")
        means.append(list(mean))
        stds.append(list(std))
        tell(done + 1)
    return Latents(means, stds, float(base.vae.config["scaling_factor"]))
