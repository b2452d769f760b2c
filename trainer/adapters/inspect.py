"""Report on a finished adapter: kind, ranks, strength by block, metadata, hashes and UI support."""

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
CONVS = ("conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj")  # last path components
SETTINGS = {
    "ss_sd_model_name": "base", "ss_resolution": "resolution", "modelspec.prediction_type": "prediction",
    "ss_num_train_images": "images", "ss_epoch": "epoch", "ss_steps": "steps", "ss_unet_lr": "learning rate (UNet)",
    "ss_text_encoder_lr": "learning rate (text)", "ss_optimizer": "optimizer", "ss_lr_scheduler": "LR scheduler",
    "ss_min_snr_gamma": "min-SNR gamma", "ss_noise_offset": "noise offset", "ss_seed": "seed",
    "ss_mixed_precision": "precision", "ss_clip_skip": "clip skip", "ss_training_comment": "comment",
}  # fmt: skip
SHOWN_TAGS = 12


@dataclass(frozen=True)
class Hashes:
    """Hex digests that identify adapters. `model` is the SHA-256 of the bytes after the header, `file` of all bytes;
    `stored` is the model hash recorded in the metadata, or empty.
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
    """A group of modules in one component: their number, ranks and alphas (None: no alpha in the file)."""

    label: str
    modules: int
    ranks: tuple[int, ...]
    alphas: tuple[float | None, ...]


@dataclass(frozen=True)
class Report:
    """Everything that `scumble adapter inspect` shows for one file. `norms` are Frobenius norms of each module's dW."""

    path: str
    bytes: int
    family: str
    network: str  # lora, loha, lokr, full or dora; joined by + if a file has several
    dialect: str
    dtypes: tuple[str, ...]
    groups: tuple[Group, ...]
    trigger: str
    tags: tuple[tuple[str, int], ...]
    settings: dict[str, str]
    hashes: Hashes
    norms: dict[ModulePath, float]
    zero: tuple[ModulePath, ...]
    broken: tuple[ModulePath, ...]  # modules with non-finite values
    uis: tuple[Match, ...]
    paths: tuple[str, ...]  # metadata keys whose values contain file paths


def inspect(path: Path) -> Report:
    """Inspect an adapter file of any dialect. Raises `Refused` if it is not an adapter."""
    tensors, metadata = read_named(path)
    adapter = from_tensors(tensors, metadata, str(path))
    broken = tuple(layer for layer, module in adapter.modules.items() if not module.is_finite)
    norms = {layer: norm(module) for layer, module in adapter.modules.items() if layer not in broken}
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
        zero=tuple(layer for layer, size in norms.items() if size == 0),
        broken=broken,
        uis=tuple(matches(tensors, adapter.modules, adapter.family)),
        paths=tuple(without_paths(metadata)[1]),
    )


def norm(module: Module) -> float:
    """Return the Frobenius norm of dW = s · up @ down (without DoRA magnitudes).

    ||up @ down||² = sum(upᵀ up ∘ down downᵀ), so the (out, in) product is never built; ||kron(a, b)|| = ||a|| · ||b||.
    A LoHa of small rank has low-rank factors too.
    """
    parts = {name: tensor.double() for name, tensor in module.tensors.items()}
    if module.kind == "lora" and "lora_mid" not in parts:
        return abs(module.scale) * _product_norm(parts["lora_up"], parts["lora_down"])
    if module.kind == "lokr" and "lokr_t2" not in parts:
        return abs(module.scale) * _factor_norm(parts, "lokr_w1") * _factor_norm(parts, "lokr_w2")
    if factors := factors_of(module):
        return _product_norm(factors.up.double(), factors.down.double())
    return float(module.delta().norm())


def block_norms(norms: Mapping[ModulePath, float]) -> dict[str, tuple[float, int]]:
    """Return for each block of the base the norm of all its deltas, sqrt(sum of squares), and their number."""
    squares: dict[str, float] = {}
    counts: Counter[str] = Counter()
    for layer, size in sorted(norms.items(), key=lambda item: _order(item[0])):
        label = block_of(layer)
        squares[label] = squares.get(label, 0.0) + size**2
        counts[label] += 1
    return {label: (square**0.5, counts[label]) for label, square in squares.items()}


def block_of(layer: ModulePath) -> str:
    """Return a readable name of a layer's block: `UNet down 0`, `UNet mid`, `text encoder layers 0-3`."""
    first, *rest = layer.path.split(".")
    if layer.component == "unet":
        side = first.removesuffix("_blocks").removesuffix("_block")
        return f"UNet {side} {rest[0]}" if first in ("down_blocks", "up_blocks") else f"UNet {side.replace('_', ' ')}"
    if first == "encoder" and len(rest) > 1 and rest[1].isdigit():
        start = int(rest[1]) // 4 * 4
        return f"{COMPONENT_LABELS[layer.component]} layers {start}-{start + 3}"
    return f"{COMPONENT_LABELS[layer.component]} {first.replace('_', ' ')}"


def network_of(adapter: Adapter) -> str:
    kinds = set(adapter.kinds)
    if any(module.is_dora for module in adapter.modules.values()):
        kinds = (kinds - {"lora"}) | {"dora"}
    return "+".join(sorted(kinds))


def diffusers_limit(network: str) -> str:
    """Return why stock diffusers cannot apply adapters of this kind, or an empty string. It supports only LoRA."""
    kinds = network.split("+")
    others = " and ".join(LABELS[kind] for kind in kinds if kind not in ("lora", "dora"))
    return f"does not support {others}" if others else "drops DoRA magnitudes" if "dora" in kinds else ""


def incomplete_uis(uis: Iterable[Match], network: str) -> tuple[str, ...]:
    """Return the UIs that do not load all modules, except diffusers if it does not support this kind of adapter."""
    excluded = "diffusers" if diffusers_limit(network) else ""
    return tuple(match.ui for match in uis if not match.is_complete and match.ui != excluded)


def groups_of(adapter: Adapter) -> Iterable[Group]:
    """Group modules by component, with the UNet convolutions (and their time projections) in a group of their own."""
    groups: dict[str, list[Module]] = {}
    for layer, module in sorted(adapter.modules.items(), key=lambda item: _order(item[0])):
        conv = layer.component == "unet" and layer.path.rpartition(".")[2] in CONVS
        groups.setdefault("UNet convolutions" if conv else COMPONENT_LABELS[layer.component], []).append(module)
    for label, modules in groups.items():
        ranks = sorted({module.rank for module in modules})
        alphas = sorted({module.alpha for module in modules}, key=lambda alpha: (alpha is None, alpha))
        yield Group(label, len(modules), tuple(ranks), tuple(alphas))


def hashes(path: Path, stored: str) -> Hashes:
    """Compute both digests in one pass over the file."""
    header_bytes = read_header(path).size
    file_hash, model_hash = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as file:
        file_hash.update(file.read(header_bytes))
        while chunk := file.read(2**20):
            file_hash.update(chunk)
            model_hash.update(chunk)
    return Hashes(model_hash.hexdigest(), file_hash.hexdigest(), stored)


def tag_counts(metadata: Mapping[str, str]) -> Counter[str]:
    """Sum `ss_tag_frequency` over its folders. Empty if it cannot be parsed."""
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


def _order(layer: ModulePath) -> tuple[int, int, list[tuple[int, str]]]:
    """Sort key in forward order: text encoders first, then the UNet from its first layer to its last."""
    component = ("text", "text2", "unet").index(layer.component)
    stages = ("time_embedding", "add_embedding", "conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out")
    first = layer.path.partition(".")[0]
    numbered = [(int(name), "") if name.isdigit() else (-1, name) for name in layer.path.split(".")]
    return component, stages.index(first) if first in stages else len(stages), numbered
