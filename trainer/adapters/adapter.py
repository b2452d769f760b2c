"""An adapter in memory: the factors and scale of each layer, independent of the file's key dialect."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch

from scumble.configs.errors import Refused

from .base_tags import FAMILY_OF_CONTEXT, FAMILY_OF_VERSION
from .files import read_tensors
from .keys import Key, ModulePath, kohya_stem, parse_key, peft_stem
from .module import Module
from .peft_config import alpha_at, metadata_beside, settings_in

KINDS = {"lora_": "lora", "hada_": "loha", "lokr_": "lokr", "diff": "full"}  # by slot prefix
REQUIRED_SLOTS = {
    "lora": ("lora_down", "lora_up"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "full": ("diff",),
}
MAX_VALUES = 2**28  # per layer; the largest SDXL layer has 2^25


@dataclass(frozen=True)
class Adapter:
    """A whole adapter: modules by layer, file metadata, family (sd1, sd2, sdxl) and key dialect (kohya, peft)."""

    modules: dict[ModulePath, Module]
    metadata: dict[str, str] = field(default_factory=dict)
    family: str = "sd1"
    dialect: str = "kohya"

    @property
    def kinds(self) -> set[str]:
        return {module.kind for module in self.modules.values()}


def read_adapter(path: Path) -> Adapter:
    """Read a finished adapter in any dialect. Raises `Refused` if a key is unknown or a shape is invalid."""
    tensors, metadata = read_named(path)
    return from_tensors(tensors, metadata, str(path))


def read_named(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read tensors under their original names, and the metadata, including PEFT's `adapter_config.json`."""
    tensors, metadata = read_tensors(path)
    return tensors, metadata_beside(path) | metadata


def from_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], name: str) -> Adapter:
    """Build an adapter from named tensors. `name` identifies the file in error messages."""
    keys = {tensor_name: parse_key(tensor_name) for tensor_name in tensors}
    unknown = [tensor_name for tensor_name, key in keys.items() if key is None]
    if unknown:
        raise Refused(f"{name}: {len(unknown)} of {len(keys)} keys are not adapter keys, first {unknown[0][:80]}")
    if not keys:
        raise Refused(f"{name}: contains no tensors")
    found: dict[ModulePath, dict[str, torch.Tensor]] = {}
    dialects = set()
    for tensor_name, key in keys.items():
        assert isinstance(key, Key)
        if key.slot in found.setdefault(key.layer, {}):
            raise Refused(f"{name}: {key.layer} has more than one {key.slot}, second {tensor_name}")
        found[key.layer][key.slot] = tensors[tensor_name]
        dialects.add(key.dialect)
    dialect = "kohya" if "kohya" in dialects else "peft"
    settings = settings_in(metadata)
    modules = {
        layer: _module(slots, layer, dialect, settings, f"{name}: {layer}") for layer, slots in sorted(found.items())
    }
    return Adapter(modules, dict(metadata), _family(modules, metadata), dialect)


def _module(
    slots: dict[str, torch.Tensor], layer: ModulePath, dialect: str, settings: Mapping[str, object], where: str
) -> Module:
    """Build one layer's module. Raises `Refused` if a tensor is missing or has an invalid shape."""
    kind = next((kind for slot in slots for start, kind in KINDS.items() if slot.startswith(start)), None)
    missing = [slot for slot in REQUIRED_SLOTS.get(kind or "", ()) if slot not in slots]
    if kind == "lokr":
        halves = ("lokr_w1", "lokr_w2")
        missing = [half for half in halves if half not in slots and not {f"{half}_a", f"{half}_b"} <= slots.keys()]
    if kind is None or missing:
        raise Refused(f"{where} is missing {', '.join(missing) or 'its factors'}")
    alpha = slots.pop("alpha", None)
    if alpha is not None and alpha.numel() != 1:
        raise Refused(f"{where} has {alpha.numel()} values for alpha, expected 1")
    for slot, tensor in slots.items():
        if not tensor.is_floating_point():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise Refused(f"{where} has {slot} in {dtype}, expected a floating-point type")
        if not tensor.numel() or (tensor.dim() < 2 and slot not in ("dora_scale", "diff_b")):
            raise Refused(f"{where} has {slot} of shape {tuple(tensor.shape)}, expected a non-empty matrix")
    module = Module(kind, slots, None if alpha is None else float(alpha))
    if not module.shape:
        raise Refused(f"{where} has factors whose shapes do not match")
    if prod(module.shape) > MAX_VALUES:
        raise Refused(f"{where} is {module.shape[0]} x {module.shape[1]}, larger than any Stable Diffusion layer")
    if dialect == "peft" and module.is_dora:  # (out) or (1, out, 1, 1) -> (out, 1, …)
        ones = [1] * (slots["lora_down"].dim() - 1)
        slots["dora_scale"] = slots["dora_scale"].reshape(-1, *ones)
    return module if alpha is not None else replace(module, alpha=alpha_at(layer, module.rank, settings, where))


def to_tensors(adapter: Adapter, dialect: str = "kohya") -> dict[str, torch.Tensor]:
    """Return named tensors ready to write. In kohya files, each component has one alpha for all LoRA modules.

    The diffusers loader replaces alphas that differ from the component's most common one, so other scales are folded
    into the factors. It assumes a scale of 1 for PEFT files, so there the scale is folded into `lora_B`.
    """
    tensors: dict[str, torch.Tensor] = {}
    common = _common_alphas(adapter)
    for layer, module in adapter.modules.items():
        if dialect == "peft":
            tensors |= _peft_tensors(layer, module)
            continue
        if module.is_dora and adapter.dialect == "peft":
            raise Refused(
                f"{layer}: PEFT's DoRA has per-output magnitudes, which no UI computes the way PEFT does; "
                "merge it into its base with `scumble adapter bake`"
            )
        stem = kohya_stem(layer, adapter.family)
        factors = dict(module.tensors)
        alpha = module.scale * (module.rank or 1)
        if module.kind == "lora":
            factors["lora_up"] = _scaled(factors["lora_up"], alpha / common[layer.component])
            alpha = common[layer.component]
        for slot, tensor in factors.items():
            suffix = f"{slot}.weight" if slot in ("lora_down", "lora_up", "lora_mid") else slot
            tensors[f"{stem}.{suffix}"] = tensor
        if module.kind != "full":
            tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def _peft_tensors(layer: ModulePath, module: Module) -> dict[str, torch.Tensor]:
    """Return a module's tensors under PEFT's names. Raises `Refused` for kinds that PEFT does not support."""
    if module.kind != "lora" or "lora_mid" in module.tensors:
        raise Refused(f"{layer}: a PEFT file cannot hold {module.label}; use --to kohya")
    stem, down = peft_stem(layer), module.tensors["lora_down"]
    tensors = {
        f"{stem}.lora_A.weight": down,
        f"{stem}.lora_B.weight": _scaled(module.tensors["lora_up"], module.scale),
    }
    if module.is_dora:
        magnitude = module.tensors["dora_scale"]
        if magnitude.shape[0] == 1:
            raise Refused(f"{layer}: a PEFT file cannot hold DoRA with per-input magnitudes; use --to kohya")
        tensors[f"{stem}.lora_magnitude_vector"] = magnitude.reshape([-1] if down.dim() == 2 else [1, -1, 1, 1])
    return tensors


def _common_alphas(adapter: Adapter) -> dict[str, float]:
    """Return the most common alpha of the LoRA modules in each component."""
    counts: dict[str, Counter[float]] = {}
    for layer, module in adapter.modules.items():
        if module.kind == "lora":
            counts.setdefault(layer.component, Counter())[module.scale * module.rank] += 1
    return {component: counter.most_common(1)[0][0] or 1.0 for component, counter in counts.items()}


def _scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    return tensor if factor == 1.0 else (tensor.float() * factor).to(tensor.dtype)


def _family(modules: Mapping[ModulePath, Module], metadata: Mapping[str, str]) -> str:
    """Detect the family from the cross-attention width, else from the metadata, else from the text encoders."""
    for layer, module in modules.items():
        if layer.component == "unet" and layer.path.endswith(("attn2.to_k", "attn2.to_v")):
            width = _in_features(module)
            if width in FAMILY_OF_CONTEXT:
                return FAMILY_OF_CONTEXT[width]
    if metadata.get("ss_base_model_version") in FAMILY_OF_VERSION:
        return FAMILY_OF_VERSION[metadata["ss_base_model_version"]]
    if any(layer.component == "text2" for layer in modules):
        return "sdxl"
    widths = {
        _in_features(module) for layer, module in modules.items()
        if layer.component == "text" and layer.path.endswith("q_proj")
    }  # fmt: skip
    return "sd2" if 1024 in widths else "sd1"


def _in_features(module: Module) -> int:
    """Input size of the Linear layer that a module modifies."""
    assert module.shape
    return module.shape[1]
