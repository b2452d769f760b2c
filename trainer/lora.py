"""LoRA on a loaded base, by PEFT: which layers, at which rank and scale, and how many parameters that makes."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from scumble.configs.errors import Refused
from scumble.configs.options import Network

from .adapters.keys import text_key, unet_key
from .models import Base

ADAPTER = "scumble"
ATTENTION = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
FULL = r".*\.attentions\.\d+\.(proj_in|proj_out|.*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2))"
CONVS = r".*\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|.*\.(downsamplers|upsamplers)\.0\.conv"
TEXT = r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
PRESET_TARGETS = {"attention": ATTENTION, "full": FULL}


@dataclass(frozen=True)
class Part:
    """The adapter's share of one component: `name` is unet, text or text2; alpha / rank is its scale."""

    name: str
    rank: int
    alpha: float
    conv_rank: int = 0
    conv_alpha: float = 0.0


@dataclass(frozen=True)
class Trained:
    """One adapted module of the live model, with the stem of its keys in the file."""

    part: str
    path: str
    key: str
    layer: LoraLayer

    @property
    def down(self) -> torch.nn.Parameter:
        """(rank, in) of a Linear, (rank, in, h, w) of a convolution."""
        return _weight(self.layer.lora_A[ADAPTER])

    @property
    def up(self) -> torch.nn.Parameter:
        """(out, rank) of a Linear, (out, rank, 1, 1) of a convolution."""
        return _weight(self.layer.lora_B[ADAPTER])

    @property
    def scale(self) -> float:
        """s of W + s · up @ down."""
        return float(self.layer.scaling[ADAPTER])

    @property
    def rank(self) -> int:
        return int(self.layer.r[ADAPTER])


def attach(base: Base, network: Network, parts: list[Part], seed: int) -> list[Trained]:
    """Put a LoRA on each part of the base, in fp32, up = 0 (Hu et al. 2021); returns every adapted module in order.

    Raises `Refused` where a regex of the options matches no layer.
    """
    trained: list[Trained] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in parts:
            component = component_of(base, part.name)
            if part.name == "unet":
                check_targets(network.targets, [path for path, _ in component.named_modules()])
            inject_adapter_in_model(_config(part, network), component, ADAPTER)
            trained += _adapted(base, part.name, component)
    for module in trained:
        for parameter in (module.down, module.up):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return trained


def check_targets(targets: str, paths: list[str]) -> None:
    """Raises `Refused` where `targets` is no preset's name and no regex that matches a whole path."""
    try:
        chosen = re.compile(PRESET_TARGETS.get(targets, targets))
    except re.error as error:
        raise Refused(f"--targets {targets}: neither attention nor full, and no regex ({error})") from None
    if not any(chosen.fullmatch(path) for path in paths):
        raise Refused(f"--targets {targets}: no layer of the UNet has such a path; use attention, full or a regex")


def component_of(base: Base, part: str) -> UNet2DConditionModel | CLIPTextModel | CLIPTextModelWithProjection:
    """The module that a part adapts."""
    return base.unet if part == "unet" else base.text_encoders[["text", "text2"].index(part)]


def recompute_activations(base: Base, parts: Sequence[Part]) -> None:
    """Gradient checkpointing in every part that is trained: less memory, the same gradients, more time."""
    for part in parts:
        if part.name == "unet":
            base.unet.enable_gradient_checkpointing()
        else:
            component = component_of(base, part.name)
            assert isinstance(component, CLIPTextModel | CLIPTextModelWithProjection)
            component.gradient_checkpointing_enable({"use_reentrant": False})


def num_parameters(trained: list[Trained]) -> int:
    """Trainable parameters: rank · (in + out) of each Linear, rank · (in · h · w + out) of each convolution."""
    return sum(module.down.numel() + module.up.numel() for module in trained)


def _weight(module: torch.nn.Module) -> torch.nn.Parameter:
    assert isinstance(module.weight, torch.nn.Parameter)
    return module.weight


def _config(part: Part, network: Network) -> LoraConfig:
    if part.name != "unet":
        return LoraConfig(
            r=part.rank,
            lora_alpha=part.alpha,  # ty: ignore[invalid-argument-type]
            target_modules=TEXT,
            lora_dropout=network.dropout,
            use_rslora=network.rslora,
        )
    chosen = PRESET_TARGETS.get(network.targets, network.targets)
    targets = f"(?:{chosen})|(?:{CONVS})" if part.conv_rank else chosen
    return LoraConfig(
        r=part.rank,
        lora_alpha=part.alpha,  # ty: ignore[invalid-argument-type]
        target_modules=targets,
        rank_pattern={f"(?:{CONVS})": part.conv_rank} if part.conv_rank else {},
        alpha_pattern={f"(?:{CONVS})": part.conv_alpha} if part.conv_rank else {},
        lora_dropout=network.dropout,
        use_rslora=network.rslora,
    )


def _adapted(base: Base, part: str, component: torch.nn.Module) -> Iterator[Trained]:
    for path, module in component.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            if part == "unet":
                key = unet_key(path, sgm=base.family.name == "sdxl")
            else:
                key = text_key(path, base.family.text_prefixes[0 if part == "text" else 1])
            yield Trained(part, path, key, module)
