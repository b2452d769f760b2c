"""Pictures -> latents, encoded once: the posterior's mean and std of each picture.

A set as artists have it stays on the device as a whole; one that is larger than `MAX_RESIDENT_BYTES` is read from the
cache as it is needed, with flat memory.
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

VERSION = 1  # of what an entry holds and how it is computed
MAX_RESIDENT_BYTES = 2 * 2**30
PASS = 8  # pictures in one pass of the VAE on CUDA
ImageCrops = tuple[Path, Sequence[Crop]]
Entry = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Latents:
    """`mean[i][c]` and `std[i][c]` are (4, H/8, W/8) fp32 of crop c of picture i."""

    mean: Sequence[Sequence[torch.Tensor]]
    std: Sequence[Sequence[torch.Tensor]]
    scale: float

    def sample(self, places: Sequence[tuple[int, int]], noise: torch.Tensor) -> torch.Tensor:
        """A draw (B, 4, H/8, W/8) of the posteriors of (picture, crop) in one bucket, scaled as the UNet wants it."""
        mean = torch.stack([self.mean[index][crop] for index, crop in places])
        std = torch.stack([self.std[index][crop] for index, crop in places])
        return (mean + std * noise) * self.scale


class Streamed(Sequence[Sequence[torch.Tensor]]):
    """One slot of many entries, read from the cache when asked for."""

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
    tell: Callable[[int], None] = lambda done: None,
    cache: Cache | None = None,
    say: Callable[[str], None] = lambda line: None,
    max_resident_bytes: int = MAX_RESIDENT_BYTES,
    digests: Mapping[Path, str] = MappingProxyType({}),
) -> Latents:
    """Encode every picture with the base's VAE, or take it from the cache; `tell` counts, `say` is told of trouble.

    Raises `Refused` where the VAE gives numbers that are not finite, and (73) where a set that is too large for the
    memory cannot be written into the cache, or there is none.
    """
    device, scale = base.device, float(base.vae.config["scaling_factor"])
    shrink = 2 ** (len(base.vae.config["block_out_channels"]) - 1)
    pixels = sum(crop.target.width * crop.target.height for _, crops in views for crop in crops)
    large = pixels // shrink**2 * 2 * 4 * 4 > max_resident_bytes
    if large and cache is None:
        raise Refused(
            f"--latent-cache off: {len(views)} pictures do not stay in memory; leave the cache on", CANNOT_WRITE
        )
    vae = digest_of_tensors(base.vae.state_dict()) if cache else ""
    keys: list[str] = []
    kept: list[Entry] = []
    for group in _groups(views, PASS if device.type == "cuda" else 1):
        names = [
            key_of(VERSION, digests.get(path) or digest_of_file(path), vae, *crops, device.type)
            for path, crops in group
            if cache
        ]
        found = [cache.get(name) for name in names] if cache else []
        entries = [entry for entry in found if entry is not None]
        if len(entries) < len(group):  # a group is encoded as a whole, so that its numbers never depend on the cache
            entries = encode_images(base, group)
            if cache and (trouble := _put(cache, dict(zip(names, entries, strict=True)))):
                if large:
                    raise Refused(trouble, CANNOT_WRITE)
                say(f"{trouble}; goes on without")
                cache = None
        if large:
            keys += names
        else:
            kept += [{slot: tensor.to(device) for slot, tensor in entry.items()} for entry in entries]
        tell(len(keys) + len(kept))
    if large:
        assert cache
        read = lru_cache(maxsize=64)(lambda key: _present(cache, key))
        return Latents(Streamed(keys, read, "mean", device), Streamed(keys, read, "std", device), scale)
    return Latents([list(entry["mean"]) for entry in kept], [list(entry["std"]) for entry in kept], scale)


@torch.no_grad()
def encode_images(base: Base, views: Sequence[ImageCrops]) -> list[Entry]:
    """`mean` and `std` (crops, 4, H/8, W/8), fp32, of views whose crops have one size."""
    pixels = [torch.stack(list(all_cropped(path, crops))) for path, crops in views]
    counts = [len(one) for one in pixels]
    at_once = PASS if base.vae.device.type == "cuda" else 1
    parts = torch.cat(pixels).to(base.vae.device, base.vae.dtype).split(at_once)
    posteriors = [posterior for part in parts for posterior in _posteriors(base.vae, part)]
    mean = torch.cat([posterior.mean for posterior in posteriors]).float().split(counts)
    std = torch.cat([posterior.std for posterior in posteriors]).float().split(counts)
    for (path, _), *numbers in zip(views, mean, std, strict=True):
        if not all(tensor.isfinite().all() for tensor in numbers):
            raise Refused(f"{path}: the VAE gives numbers that are not finite; name another with --vae")
    return [{"mean": one, "std": other} for one, other in zip(mean, std, strict=True)]


def _posteriors(vae: AutoencoderKL, pixels: torch.Tensor) -> list[DiagonalGaussianDistribution]:
    """Of pixels (B, 3, H, W), all at once, or as many as fit into memory. Raises `TooLarge` where not one does."""
    whole = unless_too_large(lambda: vae.encode(pixels).latent_dist)
    if whole is not None:
        return [whole]
    if len(pixels) == 1:
        height, width = pixels.shape[2:]
        raise TooLarge(f"the latents of {width}x{height} px do not fit into memory; lower --resolution", UNAVAILABLE)
    return [posterior for half in pixels.tensor_split(2) for posterior in _posteriors(vae, half)]


def _groups(views: Sequence[ImageCrops], most: int) -> Iterator[list[ImageCrops]]:
    """Neighbours whose crops have one size, at most so many."""
    group: list[ImageCrops] = []
    for view in views:
        if group and (len(group) == most or view[1][0].target != group[0][1][0].target):
            yield group
            group = []
        group.append(view)
    if group:
        yield group


def _put(cache: Cache, entries: dict[str, Entry]) -> str:
    """Write entries; what went wrong, or nothing."""
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
            f"{cache.folder}: an entry has gone while the run reads it; begin again, it is made anew", RESUMABLE
        )
    return entry
