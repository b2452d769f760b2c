"""An adapter of any kind on a loaded base for a while: its layers' weights changed, and given back afterwards."""

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
    """The base computes as with the adapter at that strength; its own weights come back bit for bit.

    The adapter must fit, see `check_fit`.
    """
    weights = {place: weight_at(base, place) for place in adapter.modules}
    own = {place: weight.clone() for place, weight in weights.items()}
    try:
        for place, module in adapter.modules.items():
            beside = {slot: tensor.to(own[place].device) for slot, tensor in module.tensors.items()}
            weights[place].copy_(replace(module, tensors=beside).on(own[place].float(), strength))
        yield
    finally:
        for place, weight in weights.items():
            weight.copy_(own[place])


def weight_at(base: Base, place: ModulePath) -> torch.nn.Parameter:
    """The layer's weight; in front of a text encoder's path transformers may have `text_model.`."""
    component = base.unet if place.component == "unet" else base.text_encoders[place.component == "text2"]
    parameters = dict(component.named_parameters())
    path = f"{place.path}.weight"
    return parameters[path] if path in parameters else parameters[f"text_model.{path}"]
