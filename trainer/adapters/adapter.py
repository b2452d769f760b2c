"""An adapter as numbers: for each layer its factors and its scale, whatever dialect the file was written in.

LoRA: dW = alpha / rank * up @ down (Hu et al. 2021). LoHa: alpha / rank * (w1_a @ w1_b) ∘ (w2_a @ w2_b), LoKr:
scale * kron(w1, w2) (both Yeh et al. 2023, LyCORIS). DoRA keeps besides a magnitude for each input (Liu et al. 2024).
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from scumble.configs.errors import Refused

from .files import read_tensors
from .keys import COMPONENT_PREFIXES, Key, Place, kohya_stem, parse_key, peft_stem

KINDS = {"lora_": "lora", "hada_": "loha", "lokr_": "lokr", "diff": "full"}  # by the beginning of a slot's name
NEEDED = {"lora": ("lora_down", "lora_up"), "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
NETWORK_MODULES = {"lora": "networks.lora", "loha": "lycoris.kohya", "lokr": "lycoris.kohya", "full": "lycoris.kohya"}
FAMILY_OF_VERSION = {"sd_v1": "sd1", "sd_v2": "sd2", "sdxl_base_v1-0": "sdxl"}
FAMILY_OF_CONTEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


@dataclass(frozen=True)
class Module:
    """What an adapter does to one layer. `tensors` by slot (lora_down, lora_up, hada_…, lokr_…, dora_scale)."""

    kind: str  # lora, loha, lokr or full (a plain difference)
    tensors: dict[str, torch.Tensor]
    alpha: float | None

    @property
    def rank(self) -> int:
        """Inner size of the factors; 0 for a plain difference and for LoKr with two whole factors."""
        if self.kind == "lora":
            return self.tensors["lora_down"].shape[0]
        if self.kind == "loha":
            return self.tensors["hada_w1_b"].shape[0]
        for name in ("lokr_w1_b", "lokr_w2_b"):
            if name in self.tensors:
                return self.tensors[name].shape[0]
        return 0

    @property
    def scale(self) -> float:
        """alpha / rank; 1 where the file has no alpha, and for whole factors, as the UIs do it."""
        return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank

    def delta(self) -> torch.Tensor:
        """dW in fp32 as a matrix (out, in · h · w), to be given the layer's shape. Without DoRA's magnitudes."""
        parts = {name: tensor.float() for name, tensor in self.tensors.items()}
        if self.kind == "full":
            return parts["diff"].flatten(1)
        if self.kind == "lora":
            return self.scale * _product(parts["lora_up"], parts["lora_down"], parts.get("lora_mid"))
        if self.kind == "loha":
            one = _lycoris_product(parts["hada_w1_a"], parts["hada_w1_b"], parts.get("hada_t1"))
            two = _lycoris_product(parts["hada_w2_a"], parts["hada_w2_b"], parts.get("hada_t2"))
            return self.scale * one * two
        first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        if "lokr_w2" in parts:
            second = parts["lokr_w2"]
        else:
            second = _lycoris_product(parts["lokr_w2_a"], parts["lokr_w2_b"], parts.get("lokr_t2"))
        return self.scale * torch.kron(first, second.flatten(1))  # the kernel lies innermost, so it may be flat


@dataclass(frozen=True)
class Adapter:
    """A whole adapter: modules by place, the metadata of its file, its family (sd1, sd2, sdxl) and dialect."""

    modules: dict[Place, Module]
    metadata: dict[str, str] = field(default_factory=dict)
    family: str = "sd1"
    dialect: str = "kohya"

    @property
    def kinds(self) -> set[str]:
        return {module.kind for module in self.modules.values()}


def read_adapter(path: Path) -> Adapter:
    """Read a finished adapter of any dialect. Raises `Refused` where a key or a shape cannot be understood."""
    tensors, metadata = read_tensors(path)
    return from_tensors(tensors, metadata, str(path))


def from_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], name: str) -> Adapter:
    """The adapter that named tensors make; `name` is said in refusals."""
    keys = {tensor_name: parse_key(tensor_name) for tensor_name in tensors}
    unknown = [tensor_name for tensor_name, key in keys.items() if key is None]
    if unknown:
        raise Refused(f"{name}: {len(unknown)} of {len(keys)} keys are no adapter's, first {unknown[0]}")
    found: dict[Place, dict[str, torch.Tensor]] = {}
    dialects = set()
    for tensor_name, key in keys.items():
        assert isinstance(key, Key)
        if key.slot in found.setdefault(key.place, {}):
            raise Refused(f"{name}: {key.place.component} {key.place.path} has two {key.slot}, second {tensor_name}")
        found[key.place][key.slot] = tensors[tensor_name]
        dialects.add(key.dialect)
    settings = _peft_settings(metadata)
    modules = {}
    for place, slots in sorted(found.items()):
        kind = next((kind for slot in slots for start, kind in KINDS.items() if slot.startswith(start)), None)
        missing = [slot for slot in NEEDED.get(kind or "", ()) if slot not in slots]
        if kind is None or missing:
            raise Refused(f"{name}: {place.component} {place.path} lacks {', '.join(missing) or 'its factors'}")
        alpha = slots.pop("alpha", None)
        module = Module(kind, slots, None if alpha is None else float(alpha))
        modules[place] = module if module.alpha is not None else _with_peft_alpha(module, place, settings, name)
    family = _family(modules, metadata)
    return Adapter(modules, dict(metadata), family, "kohya" if "kohya" in dialects else "peft")


def to_tensors(adapter: Adapter, dialect: str = "kohya") -> dict[str, torch.Tensor]:
    """Named tensors as they are written. kohya: one alpha a component, other scales folded into the factors.

    diffusers' loader replaces alphas that differ from the component's most common one, so only one is safe; and it
    takes a PEFT file's scale as 1, so there the scale goes into `lora_B`.
    """
    tensors: dict[str, torch.Tensor] = {}
    common = _common_alphas(adapter)
    for place, module in adapter.modules.items():
        if dialect == "peft":
            if module.kind != "lora" or "lora_mid" in module.tensors:
                raise Refused(f"{place.component} {place.path}: {module.kind} has no place in a PEFT file; use kohya")
            stem = peft_stem(place)
            tensors[f"{stem}.lora_A.weight"] = module.tensors["lora_down"]
            tensors[f"{stem}.lora_B.weight"] = _scaled(module.tensors["lora_up"], module.scale)
            continue
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


def _common_alphas(adapter: Adapter) -> dict[str, float]:
    """For each component the alpha that most of its LoRA modules have."""
    counts: dict[str, Counter[float]] = {}
    for place, module in adapter.modules.items():
        if module.kind == "lora":
            counts.setdefault(place.component, Counter())[module.scale * module.rank] += 1
    return {component: counter.most_common(1)[0][0] or 1.0 for component, counter in counts.items()}


def _scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    return tensor if factor == 1.0 else (tensor.float() * factor).to(tensor.dtype)


def _product(up: torch.Tensor, down: torch.Tensor, middle: torch.Tensor | None) -> torch.Tensor:
    """up @ down as a matrix (out, in · h · w); with a Tucker core `middle` (r, r, h, w) between them (LyCORIS)."""
    if middle is not None:
        return torch.einsum("ijhw,pi,jr->prhw", middle, up.flatten(1), down.flatten(1)).flatten(1)
    return up.flatten(1) @ down.flatten(1)


def _lycoris_product(up: torch.Tensor, down: torch.Tensor, middle: torch.Tensor | None) -> torch.Tensor:
    """The same of LyCORIS's factors, whose first one lies the other way (r, out) when there is a core."""
    return _product(up if middle is None else up.T, down, middle)


def _peft_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's config (`unet.lora_alpha`, …), where diffusers wrote it into the file."""
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _with_peft_alpha(module: Module, place: Place, settings: Mapping[str, Any], name: str) -> Module:
    """The module with the alpha of PEFT's config: `alpha_pattern` goes first; rsLoRA's scale is alpha / sqrt(rank)."""
    prefix = COMPONENT_PREFIXES[place.component]
    patterns = settings.get(f"{prefix}.alpha_pattern") or {}
    alpha = settings.get(f"{prefix}.lora_alpha")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if not re.fullmatch(r"[\w.]+", pattern):  # a stranger's regex could run for ever
            raise Refused(f"{name}: its alpha_pattern {pattern[:80]} is no plain path, which alone is read")
        if f".{place.path}".endswith("." + pattern.removeprefix("text_model.")):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        return module
    return replace(module, alpha=alpha * (module.rank**0.5 if settings.get(f"{prefix}.use_rslora") else 1.0))


def _family(modules: Mapping[Place, Module], metadata: Mapping[str, str]) -> str:
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
    """Inputs of the layer that a module sits on."""
    if module.kind == "lora":
        return module.tensors["lora_down"].shape[1]
    if module.kind == "loha":
        return module.tensors["hada_w1_b"].shape[1]
    return module.delta().shape[1]
