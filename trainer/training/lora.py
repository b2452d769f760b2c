"""An adapter on a loaded base, by PEFT: which layers, of which kind, at which rank and scale, how many parameters."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.lora import LoraLayer
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from scumble.configs.options import Network

from ..adapters.keys import ModulePath, kohya_stem
from ..adapters.targets import CONVS, PRESET_TARGETS, TEXT, Part, check_targets
from ..base_model.load import Base
from ..system.fast_imports import hidden
from .dora import add_magnitude

ADAPTER = "scumble"
SIBLINGS = re.compile(r"(.*\.attn1)\.to_[qkv]|(.*\.attn2)\.to_[kv]")
LAYERS = {"lora": LoraLayer, "loha": LoHaLayer, "lokr": LoKrLayer}


@dataclass(frozen=True)
class AdaptedLayer:
    """One adapted module of the live model: its part, diffusers' path in it, the base's family, PEFT's layer."""

    part: str
    path: str
    family: str
    layer: LoraLayer | LoHaLayer | LoKrLayer

    @property
    def place(self) -> ModulePath:
        return ModulePath(
            self.part, self.path.removeprefix("text_model.")
        )  # which only some versions of transformers have

    @property
    def key(self) -> str:
        """The stem of its keys in the file."""
        return kohya_stem(self.place, self.family)

    @property
    def kind(self) -> str:
        """lora (with or without DoRA's magnitudes), loha or lokr."""
        return next(kind for kind, layer in LAYERS.items() if isinstance(self.layer, layer))

    @property
    def tensors(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by its slot in the file.

        LoRA: lora_down (rank, in) and lora_up (out, rank) of a Linear, (rank, in, h, w) and (out, rank, 1, 1) of a
        convolution; DoRA besides dora_scale (1, in) or (1, in, 1, 1). LoHa and LoKr: LyCORIS's factors
        (Yeh et al. 2023).
        """
        if isinstance(self.layer, LoraLayer):
            assert isinstance(self.layer, torch.nn.Module)
            own = dict(self.layer.named_parameters(recurse=False))  # DoRA's magnitudes, where it has them
            down, up = _weight(self.layer.lora_A[ADAPTER]), _weight(self.layer.lora_B[ADAPTER])
            return {"lora_down": down, "lora_up": up, **own}
        tables = {slot: getattr(self.layer, slot) for slot in self.layer.adapter_layer_names}
        return {slot: table[ADAPTER] for slot, table in tables.items() if ADAPTER in table}

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) where it is rank-stabilised: s of W + s · up @ down."""
        return float(self.layer.scaling[ADAPTER])

    @property
    def rank(self) -> int:
        return int(self.layer.r[ADAPTER])


def attach(base: Base, network: Network, parts: list[Part], seed: int) -> list[AdaptedLayer]:
    """Put an adapter on each part of the base, in fp32, its product 0; returns every adapted module in order.

    Raises `Refused` where a regex of the options matches no layer.
    """
    trained: list[AdaptedLayer] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in parts:
            component = component_of(base, part.name)
            if part.name == "unet":
                check_targets(network.targets, [path for path, _ in component.named_modules()])
            with hidden("bitsandbytes"):  # PEFT asks for it to learn that no layer is one of its
                inject_adapter_in_model(_config(part, network), component, ADAPTER)
            adapted = list(_adapted(base, part.name, component))
            if network.algorithm == "dora":
                for module in adapted:
                    assert isinstance(module.layer, LoraLayer)
                    add_magnitude(module.layer, ADAPTER)
            trained += adapted
    for module in trained:
        for parameter in module.tensors.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return trained


def memory_order(trained: Iterable[AdaptedLayer]) -> list[torch.nn.Parameter]:
    """What is trained, in the order in which it lies in memory: factors of layers that hear the same next to each
    other, first all A, then all B, as one product of them wants (`product.together`)."""
    found: list[torch.nn.Parameter] = []
    for _, siblings in groupby(trained, _what_it_hears):
        for same in zip(*(module.tensors.values() for module in siblings), strict=True):
            found += same
    return found


def _what_it_hears(module: AdaptedLayer) -> tuple[str, str]:
    """Its part, and its own path, or that of its attention where q, k and v, or k and v, are of one input."""
    siblings = SIBLINGS.fullmatch(module.path)
    return module.part, next(filter(None, siblings.groups())) if siblings else module.path


def component_of(base: Base, part: str) -> UNet2DConditionModel | CLIPTextModel | CLIPTextModelWithProjection:
    """The module that a part adapts."""
    return base.unet if part == "unet" else base.text_encoders[["text", "text2"].index(part)]


def num_parameters(trained: list[AdaptedLayer]) -> int:
    """Trainable parameters; of LoRA rank · (in + out) a Linear, rank · (in · h · w + out) a convolution."""
    return sum(parameter.numel() for module in trained for parameter in module.tensors.values())


def _weight(module: torch.nn.Module) -> torch.nn.Parameter:
    assert isinstance(module.weight, torch.nn.Parameter)
    return module.weight


def _config(part: Part, network: Network) -> LoraConfig | LoHaConfig | LoKrConfig:
    targets = PRESET_TARGETS.get(network.targets, network.targets) if part.name == "unet" else TEXT
    own_rank = {"rank_pattern": {f"(?:{CONVS})": part.conv_rank}, "alpha_pattern": {f"(?:{CONVS})": part.conv_alpha}}
    shared: dict[str, Any] = {"r": part.rank, "target_modules": targets}
    if part.conv_rank:
        shared |= {"target_modules": f"(?:{targets})|(?:{CONVS})", **own_rank}
    alpha: Any = part.alpha  # PEFT says int and takes any number
    if network.algorithm == "loha":
        return LoHaConfig(alpha=alpha, **shared)
    if network.algorithm == "lokr":
        factor = -1 if network.lokr_factor == "auto" else network.lokr_factor
        return LoKrConfig(alpha=alpha, decompose_factor=factor, **shared)
    return LoraConfig(lora_alpha=alpha, lora_dropout=network.lora_dropout, use_rslora=network.rslora, **shared)


def _adapted(base: Base, part: str, component: torch.nn.Module) -> Iterator[AdaptedLayer]:
    for path, module in component.named_modules():
        if isinstance(module, LoraLayer | LoHaLayer | LoKrLayer):
            yield AdaptedLayer(part, path, base.family.name, module)
