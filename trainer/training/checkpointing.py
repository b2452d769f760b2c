"""Gradient checkpointing: which blocks recompute their activations in the backward pass."""

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


def enable_gradient_checkpointing(base: Base, parts: Sequence[Part], only_shallow: bool = False) -> None:
    """Enable gradient checkpointing in every trained part: less memory, the same gradients, more time.

    With `only_shallow`, only in the blocks where it saves the most memory for the time it takes (`shallow_blocks`).
    """
    for part in parts:
        component = component_of(base, part.name)
        if isinstance(component, UNet2DConditionModel):
            enable_unet_checkpointing(component, only_shallow)
        elif not only_shallow:
            with warnings.catch_warnings():  # deprecated, but older versions of transformers have no other name
                warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.*")
                component.gradient_checkpointing_enable(_how_to_checkpoint(component))


def enable_unet_checkpointing(unet: UNet2DConditionModel, only_shallow: bool = False) -> None:
    """Enable gradient checkpointing in all blocks of a UNet, or only in its `shallow_blocks`."""
    function = partial(_checkpointed, _how_to_checkpoint(unet))
    if not only_shallow:
        unet.enable_gradient_checkpointing(function)
        return
    for block in shallow_blocks(unet):
        for module in block.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing, module._gradient_checkpointing_func = True, function


def _how_to_checkpoint(component: torch.nn.Module) -> dict[str, Any]:
    """Arguments of `checkpoint`. The random state is saved only with dropout: older torch cannot capture reading it."""
    drops = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in component.modules())
    return {"use_reentrant": False, "preserve_rng_state": drops}


def shallow_blocks(unet: UNet2DConditionModel) -> list[Any]:
    """The blocks with fewer channels than the deepest ones.

    With c channels at n positions a block stores n · c activations and needs n · c² operations. For SDXL, recomputing
    these blocks costs a quarter of the time of recomputing all: tests/benchmarks/results/memory.md.
    """
    widths = unet.config["block_out_channels"]
    pairs = [*zip(unet.down_blocks, widths, strict=True), *zip(unet.up_blocks, reversed(widths), strict=True)]
    return [block for block, width in pairs if width < max(widths)]


def _checkpointed(how: dict[str, Any], module: torch.nn.Module, *inputs: Any) -> Any:
    return checkpoint(module.__call__, *inputs, **how)
