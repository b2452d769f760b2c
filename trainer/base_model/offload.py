"""Modules that a step does not need wait in the machine's memory, so that a CUDA device holds the UNet alone.

Of SDXL in 16 bits the UNet has 5.1 GB; text encoders and VAE have 1.8 more, and compute for moments only: before the
first step, and for previews.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from .load import Base, offload_device


def waits(base: Base, module: torch.nn.Module) -> bool:
    """Whether it lies elsewhere than where it computes."""
    return next(module.parameters()).device.type != base.device.type


def send(module: torch.nn.Module, place: torch.device) -> None:
    module.to(place)


def fetch(base: Base, *modules: torch.nn.Module) -> None:
    """Bring modules to where they compute, for good."""
    for module in modules:
        send(module, base.device)


@contextmanager
def on_device(base: Base, *modules: torch.nn.Module) -> Generator[None]:
    """Within the block the modules lie where they compute; those that waited wait again after it."""
    fetched = [module for module in modules if waits(base, module)]
    try:
        fetch(base, *fetched)
        yield
    finally:
        for module in fetched:
            send(module, offload_device(base.device))
