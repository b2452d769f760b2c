"""An adapter as numbers: for each layer its factors and its scale, whatever dialect the file was written in."""

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

KINDS = {"lora_": "lora", "hada_": "loha", "lokr_": "lokr", "diff": "full"}  # by the beginning of a slot's name
NEEDED = {
    "lora": ("lora_down", "lora_up"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "full": ("diff",),
}
MOST_VALUES = 2**28  # of one layer; the largest of SDXL has 2^25


@dataclass(frozen=True)
class Adapter:
    """A whole adapter: modules by place, the metadata of its file, its family (sd1, sd2, sdxl) and dialect."""

    modules: dict[ModulePath, Module]
    metadata: dict[str, str] = field(default_factory=dict)
    family: str = "sd1"
    dialect: str = "kohya"

    @property
    def kinds(self) -> set[str]:
        return {module.kind for module in self.modules.values()}


def read_adapter(path: Path) -> Adapter:
    """Read a finished adapter of any dialect. Raises `Refused` where a key or a shape cannot be understood."""
    tensors, metadata = read_named(path)
    return from_tensors(tensors, metadata, str(path))


def read_named(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of an adapter's file as they are named in it, with what PEFT keeps beside it."""
    tensors, metadata = read_tensors(path)
    return tensors, metadata_beside(path) | metadata


def from_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], name: str) -> Adapter:
    """The adapter that named tensors make; `name` is said in refusals."""
    keys = {tensor_name: parse_key(tensor_name) for tensor_name in tensors}
    unknown = [tensor_name for tensor_name, key in keys.items() if key is None]
    if unknown:
        raise Refused(f"{name}: {len(unknown)} of {len(keys)} keys are no adapter's, first {unknown[0][:80]}")
    if not keys:
        raise Refused(f"{name}: there is no tensor in it")
    found: dict[ModulePath, dict[str, torch.Tensor]] = {}
    dialects = set()
    for tensor_name, key in keys.items():
        assert isinstance(key, Key)
        if key.slot in found.setdefault(key.place, {}):
            raise Refused(f"{name}: {key.place} has two {key.slot}, second {tensor_name}")
        found[key.place][key.slot] = tensors[tensor_name]
        dialects.add(key.dialect)
    dialect = "kohya" if "kohya" in dialects else "peft"
    settings = settings_in(metadata)
    modules = {
        place: _module(slots, place, dialect, settings, f"{name}: {place}") for place, slots in sorted(found.items())
    }
    return Adapter(modules, dict(metadata), _family(modules, metadata), dialect)


def _module(
    slots: dict[str, torch.Tensor], place: ModulePath, dialect: str, settings: Mapping[str, object], where: str
) -> Module:
    """One layer's tensors, understood. Raises `Refused` where one is missing or has an impossible shape."""
    kind = next((kind for slot in slots for start, kind in KINDS.items() if slot.startswith(start)), None)
    missing = [slot for slot in NEEDED.get(kind or "", ()) if slot not in slots]
    if kind == "lokr":
        halves = ("lokr_w1", "lokr_w2")
        missing = [half for half in halves if half not in slots and not {f"{half}_a", f"{half}_b"} <= slots.keys()]
    if kind is None or missing:
        raise Refused(f"{where} lacks {', '.join(missing) or 'its factors'}")
    alpha = slots.pop("alpha", None)
    if alpha is not None and alpha.numel() != 1:
        raise Refused(f"{where} has an alpha of {alpha.numel()} numbers")
    for slot, tensor in slots.items():
        if not tensor.is_floating_point():
            raise Refused(f"{where} has a {slot} of {str(tensor.dtype).removeprefix('torch.')}, not of fractions")
        if not tensor.numel() or (tensor.dim() < 2 and slot not in ("dora_scale", "diff_b")):
            raise Refused(f"{where} has a {slot} of the shape {tuple(tensor.shape)}, which is no matrix")
    module = Module(kind, slots, None if alpha is None else float(alpha))
    if not module.shape:
        raise Refused(f"{where} has factors that do not fit each other")
    if prod(module.shape) > MOST_VALUES:
        raise Refused(f"{where} is {module.shape[0]} x {module.shape[1]}, larger than any layer of Stable Diffusion")
    if dialect == "peft" and module.is_dora:  # (out) or (1, out, 1, 1) -> (out, 1, …)
        ones = [1] * (slots["lora_down"].dim() - 1)
        slots["dora_scale"] = slots["dora_scale"].reshape(-1, *ones)
    return module if alpha is not None else replace(module, alpha=alpha_at(place, module.rank, settings, where))


def to_tensors(adapter: Adapter, dialect: str = "kohya") -> dict[str, torch.Tensor]:
    """Named tensors as they are written. kohya: one alpha a component, other scales folded into the factors.

    diffusers' loader replaces alphas that differ from the component's most common one, so only one is safe; and it
    takes a PEFT file's scale as 1, so there the scale goes into `lora_B`.
    """
    tensors: dict[str, torch.Tensor] = {}
    common = _common_alphas(adapter)
    for place, module in adapter.modules.items():
        if dialect == "peft":
            tensors |= _pefts_tensors(place, module)
            continue
        if module.is_dora and adapter.dialect == "peft":
            raise Refused(
                f"{place}: PEFT's DoRA has magnitudes by outputs, which no UI computes as PEFT "
                "does; bake it into its base"
            )
        stem = kohya_stem(place, adapter.family)
        factors = dict(module.tensors)
        alpha = module.scale * (module.rank or 1)
        if module.kind == "lora":
            factors["lora_up"] = _scaled(factors["lora_up"], alpha / common[place.component])
            alpha = common[place.component]
        for slot, tensor in factors.items():
            suffix = f"{slot}.weight" if slot in ("lora_down", "lora_up", "lora_mid") else slot
            tensors[f"{stem}.{suffix}"] = tensor
        if module.kind != "full":
            tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def _pefts_tensors(place: ModulePath, module: Module) -> dict[str, torch.Tensor]:
    """A module under PEFT's names. Raises `Refused` for what PEFT has not."""
    if module.kind != "lora" or "lora_mid" in module.tensors:
        raise Refused(f"{place}: {module.label} has no place in a PEFT file; use --to kohya")
    stem, down = peft_stem(place), module.tensors["lora_down"]
    tensors = {
        f"{stem}.lora_A.weight": down,
        f"{stem}.lora_B.weight": _scaled(module.tensors["lora_up"], module.scale),
    }
    if module.is_dora:
        magnitude = module.tensors["dora_scale"]
        if magnitude.shape[0] == 1:
            raise Refused(f"{place}: DoRA by inputs has no place in a PEFT file; use --to kohya")
        tensors[f"{stem}.lora_magnitude_vector"] = magnitude.reshape([-1] if down.dim() == 2 else [1, -1, 1, 1])
    return tensors


def _common_alphas(adapter: Adapter) -> dict[str, float]:
    """For each component the alpha that most of its LoRA modules have."""
    counts: dict[str, Counter[float]] = {}
    for place, module in adapter.modules.items():
        if module.kind == "lora":
            counts.setdefault(place.component, Counter())[module.scale * module.rank] += 1
    return {component: counter.most_common(1)[0][0] or 1.0 for component, counter in counts.items()}


def _scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    return tensor if factor == 1.0 else (tensor.float() * factor).to(tensor.dtype)


def _family(modules: Mapping[ModulePath, Module], metadata: Mapping[str, str]) -> str:
    """By the width of the text that cross-attention hears, else by the metadata, else by the text encoders."""
    for place, module in modules.items():
        if place.component == "unet" and place.path.endswith(("attn2.to_k", "attn2.to_v")):
            width = _inputs(module)
            if width in FAMILY_OF_CONTEXT:
                return FAMILY_OF_CONTEXT[width]
    if metadata.get("ss_base_model_version") in FAMILY_OF_VERSION:
        return FAMILY_OF_VERSION[metadata["ss_base_model_version"]]
    if any(place.component == "text2" for place in modules):
        return "sdxl"
    widths = {
        _inputs(module) for place, module in modules.items()
        if place.component == "text" and place.path.endswith("q_proj")
    }  # fmt: skip
    return "sd2" if 1024 in widths else "sd1"


def _inputs(module: Module) -> int:
    """Inputs of the Linear that a module sits on."""
    assert module.shape
    return module.shape[1]
