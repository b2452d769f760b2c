"""Gradient checkpointing: which blocks recompute their activations."""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch.utils.checkpoint import checkpoint

from ..adapters.targets import Part
from ..base_model.load import Base
from .lora import component_of


def recompute_activations(base: Base, parts: Sequence[Part], only_shallow: bool = False) -> None:
    """Gradient checkpointing in every part that is trained: less memory, the same gradients, more time.

    `only_shallow`: only where it saves the most memory for the time it takes, see `shallow_blocks`.
    """
    for part in parts:
        component = component_of(base, part.name)
        if isinstance(component, UNet2DConditionModel):
            recompute_unet(component, only_shallow)
        elif not only_shallow:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.*")  # has a newer name
                component.gradient_checkpointing_enable(_how_to_checkpoint(component))


def recompute_unet(unet: UNet2DConditionModel, only_shallow: bool = False) -> None:
    """Gradient checkpointing in all of a UNet's blocks, or in its `shallow_blocks`."""
    function = partial(_checkpointed, _how_to_checkpoint(unet))
    if not only_shallow:
        unet.enable_gradient_checkpointing(function)
        return
    for block in shallow_blocks(unet):
        for module in block.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing, module._gradient_checkpointing_func = True, function


def _how_to_checkpoint(component: torch.nn.Module) -> dict[str, Any]:
    """Random states are kept only where something is dropped at random: older torch cannot capture reading them."""
    drops = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in component.modules())
    return {"use_reentrant": False, "preserve_rng_state": drops}


def shallow_blocks(unet: UNet2DConditionModel) -> list[Any]:
    """Blocks with fewer channels than the deepest ones: c channels at n places keep n · c numbers and take n · c² work.

    Recomputing SDXL's costs a quarter of what recomputing all does, see tests/benchmarks/results/memory.md.
    """
    widths = unet.config["block_out_channels"]
    pairs = [*zip(unet.down_blocks, widths, strict=True), *zip(unet.up_blocks, reversed(widths), strict=True)]
    return [block for block, width in pairs if width < max(widths)]


def _checkpointed(how: dict[str, Any], module: torch.nn.Module, *inputs: Any) -> Any:
    return checkpoint(module.__call__, *inputs, **how)
