"""Temporarily apply an adapter of any kind to a loaded base by changing its weights."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..base_model.load import Base
from .adapter import Adapter
from .keys import ModulePath


@contextmanager
@torch.no_grad()
def applied(base: Base, adapter: Adapter, strength: float = 1.0) -> Generator[None]:
    """Apply the adapter at the given strength inside the block; the original weights are restored bit for bit.

    The adapter must fit the base, see `check_fit`.
    """
    weights = {layer: weight_at(base, layer) for layer in adapter.modules}
    original = {layer: weight.clone() for layer, weight in weights.items()}
    try:
        for layer, module in adapter.modules.items():
            on_device = {slot: tensor.to(original[layer].device) for slot, tensor in module.tensors.items()}
            weights[layer].copy_(replace(module, tensors=on_device).on(original[layer].float(), strength))
        yield
    finally:
        for layer, weight in weights.items():
            weight.copy_(original[layer])


def weight_at(base: Base, layer: ModulePath) -> torch.nn.Parameter:
    """Return the layer's weight. Some transformers versions prefix text encoder paths with `text_model.`."""
    component = base.unet if layer.component == "unet" else base.text_encoders[layer.component == "text2"]
    parameters = dict(component.named_parameters())
    path = f"{layer.path}.weight"
    return parameters[path] if path in parameters else parameters[f"text_model.{path}"]
