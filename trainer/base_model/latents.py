"""Images -> latents, encoded once: the mean and std of the VAE posterior of each image.

Latents of typical training sets stay on the device. Sets larger than `MAX_RESIDENT_BYTES` are read from the cache on
demand, so memory use does not grow with their size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import overload

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import CANNOT_WRITE, RESUMABLE, UNAVAILABLE
from scumble.datasets.cache import Cache, digest_of_tensors, key_of
from scumble.datasets.reading.images import Crop, digest_of_file
from scumble.datasets.tensors import all_cropped

from ..system.device import to_device
from ..system.out_of_memory import TooLarge, unless_too_large
from .load import Base

VERSION = 1  # of the content of a cache entry and how it is computed
MAX_RESIDENT_BYTES = 2 * 2**30
VAE_BATCH_SIZE = 8  # images per forward pass of the VAE on CUDA
ImageCrops = tuple[Path, Sequence[Crop]]
Entry = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Latents:
    """`mean[i][c]` and `std[i][c]` (4, H/8, W/8), fp32, belong to crop c of image i."""

    mean: Sequence[Sequence[torch.Tensor]]
    std: Sequence[Sequence[torch.Tensor]]
    scale: float

    def sample(self, places: Sequence[tuple[int, int]], noise: torch.Tensor) -> torch.Tensor:
        """Sample the posteriors of (image, crop) pairs of one bucket: (B, 4, H/8, W/8), scaled for the UNet."""
        mean = torch.stack([self.mean[index][crop] for index, crop in places])
        std = torch.stack([self.std[index][crop] for index, crop in places])
        return (mean + std * noise) * self.scale


class StreamedLatents(Sequence[Sequence[torch.Tensor]]):
    """One slot (`mean` or `std`) of cache entries, read from the cache on access."""

    def __init__(self, keys: Sequence[str], read: Callable[[str], Entry], slot: str, device: torch.device):
        self.keys, self.read, self.slot, self.device = keys, read, slot, device

    @overload
    def __getitem__(self, index: int) -> Sequence[torch.Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sequence[torch.Tensor]]: ...
    def __getitem__(self, index: int | slice) -> Sequence[torch.Tensor] | Sequence[Sequence[torch.Tensor]]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        return list(to_device(self.read(self.keys[index])[self.slot], self.device))

    def __len__(self) -> int:
        return len(self.keys)


def encode_set(
    base: Base,
    views: Sequence[ImageCrops],
    progress: Callable[[int], None] = lambda done: None,
    cache: Cache | None = None,
    report: Callable[[str], None] = lambda line: None,
    max_resident_bytes: int = MAX_RESIDENT_BYTES,
    digests: Mapping[Path, str] = MappingProxyType({}),
) -> Latents:
    """Encode every image with the VAE of the base, or read its latents from the cache.

    `progress` receives the number of encoded images, `report` receives warnings. Raises `Refused` if the VAE outputs
    non-finite values, and (73) if a set too large for memory cannot be written to the cache or has no cache.
    """
    device, scale = base.device, float(base.vae.config["scaling_factor"])
    shrink = 2 ** (len(base.vae.config["block_out_channels"]) - 1)
    pixels = sum(crop.target.width * crop.target.height for _, crops in views for crop in crops)
    large = pixels // shrink**2 * 2 * 4 * 4 > max_resident_bytes
    if large and cache is None:
        raise Refused(
            f"--latent-cache off: the latents of {len(views)} images do not fit into memory; enable the cache",
            CANNOT_WRITE,
        )
    vae = digest_of_tensors(base.vae.state_dict()) if cache else ""
    keys: list[str] = []
    kept: list[Entry] = []
    for group in _groups(views, VAE_BATCH_SIZE if device.type == "cuda" else 1):
        names = [
            key_of(VERSION, digests.get(path) or digest_of_file(path), vae, *crops, device.type)
            for path, crops in group
            if cache
        ]
        found = [cache.get(name) for name in names] if cache else []
        entries = [entry for entry in found if entry is not None]
        if len(entries) < len(group):  # encode whole groups, so that results never depend on the cache
            entries = encode_images(base, group)
            if cache and (failure := _put(cache, dict(zip(names, entries, strict=True)))):
                if large:
                    raise Refused(failure, CANNOT_WRITE)
                report(f"{failure}; continuing without the cache")
                cache = None
        if large:
            keys += names
        else:
            kept += [{slot: tensor.to(device) for slot, tensor in entry.items()} for entry in entries]
        progress(len(keys) + len(kept))
    if large:
        assert cache
        read = lru_cache(maxsize=64)(lambda key: _present(cache, key))
        return Latents(StreamedLatents(keys, read, "mean", device), StreamedLatents(keys, read, "std", device), scale)
    return Latents([list(entry["mean"]) for entry in kept], [list(entry["std"]) for entry in kept], scale)


@torch.no_grad()
def encode_images(base: Base, views: Sequence[ImageCrops]) -> list[Entry]:
    """`mean` and `std` (crops, 4, H/8, W/8), fp32, of each image. All crops must have the same size."""
    pixels = [torch.stack(list(all_cropped(path, crops))) for path, crops in views]
    counts = [len(one) for one in pixels]
    at_once = VAE_BATCH_SIZE if base.vae.device.type == "cuda" else 1
    parts = torch.cat(pixels).to(base.vae.device, base.vae.dtype).split(at_once)
    posteriors = [posterior for part in parts for posterior in _posteriors(base.vae, part)]
    mean = torch.cat([posterior.mean for posterior in posteriors]).float().split(counts)
    std = torch.cat([posterior.std for posterior in posteriors]).float().split(counts)
    for (path, _), *numbers in zip(views, mean, std, strict=True):
        if not all(tensor.isfinite().all() for tensor in numbers):
            raise Refused(f"{path}: the VAE outputs non-finite values; choose another one with --vae")
    return [{"mean": one, "std": other} for one, other in zip(mean, std, strict=True)]


def _posteriors(vae: AutoencoderKL, pixels: torch.Tensor) -> list[DiagonalGaussianDistribution]:
    """Encode pixels (B, 3, H, W) in batches that fit into memory. Raises `TooLarge` if a single image does not fit."""
    whole = unless_too_large(lambda: vae.encode(pixels).latent_dist)
    if whole is not None:
        return [whole]
    if len(pixels) == 1:
        height, width = pixels.shape[2:]
        raise TooLarge(f"encoding {width}x{height} px does not fit into memory; lower --resolution", UNAVAILABLE)
    return [posterior for half in pixels.tensor_split(2) for posterior in _posteriors(vae, half)]


def _groups(views: Sequence[ImageCrops], max_size: int) -> Iterator[list[ImageCrops]]:
    """Consecutive images whose crops have the same size, at most `max_size` per group."""
    group: list[ImageCrops] = []
    for view in views:
        if group and (len(group) == max_size or view[1][0].target != group[0][1][0].target):
            yield group
            group = []
        group.append(view)
    if group:
        yield group


def _put(cache: Cache, entries: dict[str, Entry]) -> str:
    """Write entries. Returns an error message, or an empty string on success."""
    try:
        for key, entry in entries.items():
            cache.put(key, entry)
    except Refused as error:
        return f"--latent-cache {error}"
    return ""


def _present(cache: Cache, key: str) -> Entry:
    entry = cache.get(key)
    if entry is None:
        raise Refused(
            f"{cache.folder}: a cache entry was deleted during the run; restart the run to encode it again", RESUMABLE
        )
    return entry
