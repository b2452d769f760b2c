"""Attach an adapter to a loaded base with PEFT: which layers, which kind, rank and scale, how many parameters."""

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
    """An adapted layer of the live model: its part, its path in diffusers' module, the base's family, PEFT's layer."""

    part: str
    path: str
    family: str
    layer: LoraLayer | LoHaLayer | LoKrLayer

    @property
    def module_path(self) -> ModulePath:
        return ModulePath(self.part, self.path.removeprefix("text_model."))  # only some transformers versions have it

    @property
    def key(self) -> str:
        """The stem of the layer's keys in the file."""
        return kohya_stem(self.module_path, self.family)

    @property
    def kind(self) -> str:
        """lora (with or without the magnitudes of DoRA), loha or lokr."""
        return next(kind for kind, layer in LAYERS.items() if isinstance(self.layer, layer))

    @property
    def tensors(self) -> dict[str, torch.nn.Parameter]:
        """The trainable parameters by slot, as the file names them.

        LoRA: lora_down (rank, in) and lora_up (out, rank) of a Linear, (rank, in, h, w) and (out, rank, 1, 1) of a
        convolution; DoRA also has dora_scale, (1, in) or (1, in, 1, 1). LoHa and LoKr: the factors of LyCORIS
        (Yeh et al. 2023).
        """
        if isinstance(self.layer, LoraLayer):
            assert isinstance(self.layer, torch.nn.Module)
            own = dict(self.layer.named_parameters(recurse=False))  # the magnitudes of DoRA, if any
            down, up = _weight(self.layer.lora_A[ADAPTER]), _weight(self.layer.lora_B[ADAPTER])
            return {"lora_down": down, "lora_up": up, **own}
        tables = {slot: getattr(self.layer, slot) for slot in self.layer.adapter_layer_names}
        return {slot: table[ADAPTER] for slot, table in tables.items() if ADAPTER in table}

    @property
    def scale(self) -> float:
        """s in W + s · up @ down: alpha / rank, or alpha / sqrt(rank) if rank-stabilized."""
        return float(self.layer.scaling[ADAPTER])

    @property
    def rank(self) -> int:
        return int(self.layer.r[ADAPTER])


def attach(base: Base, network: Network, parts: list[Part], seed: int) -> list[AdaptedLayer]:
    """Attach an adapter to each part of the base, in fp32. Returns the adapted layers in order.

    The adapter starts as the identity: its weight change is 0. Raises `Refused` if `targets` matches no layer.
    """
    layers: list[AdaptedLayer] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in parts:
            component = component_of(base, part.name)
            if part.name == "unet":
                check_targets(network.targets, [path for path, _ in component.named_modules()])
            with hidden("bitsandbytes"):  # PEFT would import it only to check for its layer types
                inject_adapter_in_model(_config(part, network), component, ADAPTER)
            adapted = list(_adapted(base, part.name, component))
            if network.algorithm == "dora":
                for layer in adapted:
                    assert isinstance(layer.layer, LoraLayer)
                    add_magnitude(layer.layer, ADAPTER)
            layers += adapted
    for layer in layers:
        for parameter in layer.tensors.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return layers


def memory_order(layers: Iterable[AdaptedLayer]) -> list[torch.nn.Parameter]:
    """The trainable parameters in the order in which they are laid out in memory.

    Factors of layers with the same input are adjacent, first every A, then every B: `joint_linear` multiplies them as
    one matrix.
    """
    found: list[torch.nn.Parameter] = []
    for _, siblings in groupby(layers, _input_of):
        for same_slot in zip(*(layer.tensors.values() for layer in siblings), strict=True):
            found += same_slot
    return found


def _input_of(layer: AdaptedLayer) -> tuple[str, str]:
    """A key that layers with the same input share: the part and the path, for q, k and v that of their attention."""
    siblings = SIBLINGS.fullmatch(layer.path)
    return layer.part, next(filter(None, siblings.groups())) if siblings else layer.path


def component_of(base: Base, part: str) -> UNet2DConditionModel | CLIPTextModel | CLIPTextModelWithProjection:
    """The module that a part adapts."""
    return base.unet if part == "unet" else base.text_encoders[["text", "text2"].index(part)]


def num_parameters(layers: list[AdaptedLayer]) -> int:
    """Trainable parameters; LoRA has rank · (in + out) per Linear and rank · (in · h · w + out) per convolution."""
    return sum(parameter.numel() for layer in layers for parameter in layer.tensors.values())


def _weight(module: torch.nn.Module) -> torch.nn.Parameter:
    assert isinstance(module.weight, torch.nn.Parameter)
    return module.weight


def _config(part: Part, network: Network) -> LoraConfig | LoHaConfig | LoKrConfig:
    targets = PRESET_TARGETS.get(network.targets, network.targets) if part.name == "unet" else TEXT
    own_rank = {"rank_pattern": {f"(?:{CONVS})": part.conv_rank}, "alpha_pattern": {f"(?:{CONVS})": part.conv_alpha}}
    shared: dict[str, Any] = {"r": part.rank, "target_modules": targets}
    if part.conv_rank:
        shared |= {"target_modules": f"(?:{targets})|(?:{CONVS})", **own_rank}
    alpha: Any = part.alpha  # PEFT annotates int but accepts any number
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
