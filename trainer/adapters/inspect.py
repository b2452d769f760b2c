"""What a finished adapter is, in numbers and words: kind, ranks, strength by block, hashes, and which UIs read it."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..system.safetensors_header import read_header
from .adapter import Adapter, from_tensors, read_named
from .factors import factors_of
from .keys import ModulePath
from .module import LABELS, Module
from .privacy import without_paths
from .ui_keys import Match, matches

FAMILY_LABELS = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL"}
COMPONENT_LABELS = {"unet": "UNet", "text": "text encoder", "text2": "text encoder 2"}
CONVS = ("conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj")  # last words of their paths
SETTINGS = {
    "ss_sd_model_name": "base", "ss_resolution": "resolution", "modelspec.prediction_type": "prediction",
    "ss_num_train_images": "pictures", "ss_epoch": "epoch", "ss_steps": "steps", "ss_unet_lr": "rate (UNet)",
    "ss_text_encoder_lr": "rate (text)", "ss_optimizer": "optimiser", "ss_lr_scheduler": "schedule",
    "ss_min_snr_gamma": "min-SNR gamma", "ss_noise_offset": "noise offset", "ss_seed": "seed",
    "ss_mixed_precision": "precision", "ss_clip_skip": "clip skip", "ss_training_comment": "comment",
}  # fmt: skip
SHOWN_TAGS = 12


@dataclass(frozen=True)
class Hashes:
    """Hex digests people look adapters up by. `model` is sha256 of the bytes behind the header, `file` of all bytes;
    `stored` is what the metadata says of the former, empty where it says nothing.
    """

    model: str
    file: str
    stored: str

    @property
    def a1111(self) -> str:
        return self.model[:12]

    @property
    def auto_v2(self) -> str:
        return self.file[:10]


@dataclass(frozen=True)
class Group:
    """Modules of one component that share a purpose: their number, ranks and alphas (None: no alpha in the file)."""

    label: str
    modules: int
    ranks: tuple[int, ...]
    alphas: tuple[float | None, ...]


@dataclass(frozen=True)
class Report:
    """All that `scumble adapter inspect` tells of one file; `norms` are Frobenius norms of each module's dW."""

    path: str
    bytes: int
    family: str
    network: str  # lora, loha, lokr, full or dora; joined by + where a file mixes them
    dialect: str
    dtypes: tuple[str, ...]
    groups: tuple[Group, ...]
    trigger: str
    tags: tuple[tuple[str, int], ...]
    settings: dict[str, str]
    hashes: Hashes
    norms: dict[ModulePath, float]
    zero: tuple[ModulePath, ...]
    broken: tuple[ModulePath, ...]  # with a number that is not finite
    uis: tuple[Match, ...]
    paths: tuple[str, ...]  # entries of the metadata that tell paths of somebody's disk


def inspect(path: Path) -> Report:
    """Look into an adapter of any dialect. Raises `Refused` where it is none."""
    tensors, metadata = read_named(path)
    adapter = from_tensors(tensors, metadata, str(path))
    broken = tuple(place for place, module in adapter.modules.items() if not module.is_finite)
    norms = {place: norm(module) for place, module in adapter.modules.items() if place not in broken}
    factors = [tensor for module in adapter.modules.values() for tensor in module.tensors.values()]
    return Report(
        path=str(path),
        bytes=path.stat().st_size,
        family=adapter.family,
        network=network_of(adapter),
        dialect=adapter.dialect,
        dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(tensor.dtype for tensor in factors)),
        groups=tuple(groups_of(adapter)),
        trigger=metadata.get("modelspec.trigger_phrase", ""),
        tags=tuple(tag_counts(metadata).most_common(SHOWN_TAGS)),
        settings={label: metadata[key] for key, label in SETTINGS.items() if metadata.get(key, "None") != "None"},
        hashes=hashes(path, metadata.get("sshs_model_hash", "")),
        norms=norms,
        zero=tuple(place for place, size in norms.items() if size == 0),
        broken=broken,
        uis=tuple(matches(tensors, adapter.modules, adapter.family)),
        paths=tuple(without_paths(metadata)[1]),
    )


def norm(module: Module) -> float:
    """Frobenius norm of dW = s · up @ down (without DoRA's magnitudes).

    ||up @ down||² = sum(upᵀ up ∘ down downᵀ), so the (out, in) product is never made; ||kron(a, b)|| = ||a|| · ||b||.
    LoHa of a small rank has such factors too.
    """
    parts = {name: tensor.double() for name, tensor in module.tensors.items()}
    if module.kind == "lora" and "lora_mid" not in parts:
        return abs(module.scale) * _product_norm(parts["lora_up"], parts["lora_down"])
    if module.kind == "lokr" and "lokr_t2" not in parts:
        return abs(module.scale) * _factor_norm(parts, "lokr_w1") * _factor_norm(parts, "lokr_w2")
    if known := factors_of(module):
        return _product_norm(known.up.double(), known.down.double())
    return float(module.delta().norm())


def block_norms(norms: Mapping[ModulePath, float]) -> dict[str, tuple[float, int]]:
    """For each block of the base: the norm of all its deltas together, sqrt(sum of squares), and their number."""
    squares: dict[str, float] = {}
    counts: Counter[str] = Counter()
    for place, size in sorted(norms.items(), key=lambda item: _order(item[0])):
        label = block_of(place)
        squares[label] = squares.get(label, 0.0) + size**2
        counts[label] += 1
    return {label: (square**0.5, counts[label]) for label, square in squares.items()}


def block_of(place: ModulePath) -> str:
    """Where a layer sits, in words: `UNet down 0`, `UNet mid`, `text encoder layers 0-3`."""
    first, *rest = place.path.split(".")
    if place.component == "unet":
        side = first.removesuffix("_blocks").removesuffix("_block")
        return f"UNet {side} {rest[0]}" if first in ("down_blocks", "up_blocks") else f"UNet {side.replace('_', ' ')}"
    if first == "encoder" and len(rest) > 1 and rest[1].isdigit():
        start = int(rest[1]) // 4 * 4
        return f"{COMPONENT_LABELS[place.component]} layers {start}-{start + 3}"
    return f"{COMPONENT_LABELS[place.component]} {first.replace('_', ' ')}"


def network_of(adapter: Adapter) -> str:
    kinds = set(adapter.kinds)
    if any(module.is_dora for module in adapter.modules.values()):
        kinds = (kinds - {"lora"}) | {"dora"}
    return "+".join(sorted(kinds))


def beyond_diffusers(network: str) -> str:
    """Why stock diffusers cannot do what an adapter of that kind says, or nothing: it knows LoRA alone."""
    kinds = network.split("+")
    others = " and ".join(LABELS[kind] for kind in kinds if kind not in ("lora", "dora"))
    return f"it cannot read {others}" if others else "it leaves out DoRA's magnitudes" if "dora" in kinds else ""


def poor_uis(uis: Iterable[Match], network: str) -> tuple[str, ...]:
    """UIs that do not read a file whole; diffusers is excused where it does not know the kind of adapter."""
    excused = "diffusers" if beyond_diffusers(network) else ""
    return tuple(match.ui for match in uis if not match.is_whole and match.ui != excused)


def groups_of(adapter: Adapter) -> Iterable[Group]:
    """By component, the UNet's convolutions (with their time projections) for themselves."""
    groups: dict[str, list[Module]] = {}
    for place, module in sorted(adapter.modules.items(), key=lambda item: _order(item[0])):
        conv = place.component == "unet" and place.path.rpartition(".")[2] in CONVS
        groups.setdefault("UNet convolutions" if conv else COMPONENT_LABELS[place.component], []).append(module)
    for label, modules in groups.items():
        ranks = sorted({module.rank for module in modules})
        alphas = sorted({module.alpha for module in modules}, key=lambda alpha: (alpha is None, alpha))
        yield Group(label, len(modules), tuple(ranks), tuple(alphas))


def hashes(path: Path, stored: str) -> Hashes:
    """Both digests in one pass over the file."""
    header_bytes = read_header(path).size
    whole, behind = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as file:
        whole.update(file.read(header_bytes))
        while part := file.read(2**20):
            whole.update(part)
            behind.update(part)
    return Hashes(behind.hexdigest(), whole.hexdigest(), stored)


def tag_counts(metadata: Mapping[str, str]) -> Counter[str]:
    """`ss_tag_frequency` summed over its folders; nothing where it cannot be read."""
    counts: Counter[str] = Counter()
    try:
        for tags in json.loads(metadata.get("ss_tag_frequency", "{}")).values():
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return Counter()
    return counts


def _product_norm(up: torch.Tensor, down: torch.Tensor) -> float:
    up, down = up.flatten(1), down.flatten(1)
    return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


def _factor_norm(parts: Mapping[str, torch.Tensor], name: str) -> float:
    return float(parts[name].norm()) if name in parts else _product_norm(parts[f"{name}_a"], parts[f"{name}_b"])


def _order(place: ModulePath) -> tuple[int, int, list[tuple[int, str]]]:
    """As the signal passes: text encoders first, then the UNet from its first layer to its last."""
    component = ("text", "text2", "unet").index(place.component)
    words = ("time_embedding", "add_embedding", "conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out")
    first = place.path.partition(".")[0]
    numbered = [(int(word), "") if word.isdigit() else (-1, word) for word in place.path.split(".")]
    return component, words.index(first) if first in words else len(words), numbered
