"""DoRA with one magnitude per input of a layer, the form that UIs apply exactly; PEFT has one per output.

W' = m · V / ‖V‖ with V = W + s · up @ down (Liu et al. 2024, equation 5), each norm over all weights of one input.
Since magnitudes and norms are per input, they can scale the layer's input instead: W' x = V (m / ‖V‖ · x).
"""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer


def add_magnitude(layer: LoraLayer, adapter: str) -> torch.nn.Parameter:
    """Add the magnitudes of DoRA to a layer with PEFT's LoRA: `dora_scale` in fp32, (1, in) or (1, in, 1, 1).

    They are initialized to the norms of W, so that the layer starts unchanged.
    """
    assert isinstance(layer, torch.nn.Module)
    magnitude = torch.nn.Parameter(input_norms(layer.get_base_layer().weight.detach().float()))
    layer.register_parameter("dora_scale", magnitude)
    layer.register_forward_pre_hook(partial(_scale_inputs, adapter=adapter))
    return magnitude


def input_norms(weight: torch.Tensor) -> torch.Tensor:
    """The norm of a weight (out, in, …) over all dimensions but the inputs: (1, in, 1…)."""
    return torch.linalg.vector_norm(weight, dim=(0, *range(2, weight.dim())), keepdim=True)


def _scale_inputs(layer: Any, inputs: tuple[torch.Tensor, ...], adapter: str) -> tuple[torch.Tensor, ...]:
    """m / ‖V‖ · x in the dtype of x. The norm is held constant in the backward pass (section 4.3)."""
    if layer.disable_adapters:
        return inputs
    weight, up, down = layer.get_base_layer().weight, layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        delta = layer.scaling[adapter] * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
        norms = input_norms(weight.float() + delta).clamp_min(torch.finfo(torch.float32).tiny)
    first, *others = inputs
    return ((first * (layer.dora_scale / norms)).to(first.dtype), *others)
