"""Optimisers by name. Those of the extra [optimizers] are refused by name, with the install command, when absent."""

from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from io import StringIO
from typing import Any

import torch
from transformers.optimization import Adafactor

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import UNAVAILABLE

from .flat_parameters import Flat

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerInfo:
    """An optimizer: how it is made, from which package, and what suits it.

    `lr_multiple` is its learning rate as a multiple of AdamW's. Where `finds_rate`, it estimates the rate itself and
    the option is a multiple of its estimate. `lr_scheduler` is what its authors recommend. An optimizer that is not
    `elementwise` looks at the shape of each tensor.
    """

    make: Callable[[Any, Groups, float], torch.optim.Optimizer]
    package: str = "torch"
    lr_multiple: float = 1.0
    finds_rate: bool = False
    lr_scheduler: str = "cosine"
    elementwise: bool = True


def _adamw(torch_: Any, groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)  # Loshchilov and Hutter 2019


def _adafactor(transformers: Any, groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    """Shazeer and Stern 2018 with plain rates: scaled by the weights, a LoRA that starts at 0 would never move."""
    return Adafactor(groups, weight_decay=weight_decay, scale_parameter=False, relative_step=False, warmup_init=False)


def _adamw8bit(bitsandbytes: Any, groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    return bitsandbytes.optim.AdamW8bit(groups, weight_decay=weight_decay)  # Dettmers et al. 2022


def _lion(lion_pytorch: Any, groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    return lion_pytorch.Lion(groups, weight_decay=weight_decay)  # Chen et al. 2023


def _prodigy(prodigyopt: Any, groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    options = {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
    return prodigyopt.Prodigy(groups, weight_decay=weight_decay, **options)  # Mishchenko and Defazio 2023


def _schedule_free(schedulefree: Any, groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    return schedulefree.AdamWScheduleFree(groups, weight_decay=weight_decay)  # Defazio et al. 2024


OPTIMIZERS: dict[str, OptimizerInfo] = {
    "adamw": OptimizerInfo(_adamw),
    "adamw8bit": OptimizerInfo(_adamw8bit, "bitsandbytes", elementwise=False),
    "lion": OptimizerInfo(_lion, "lion_pytorch", lr_multiple=0.2),
    "prodigy": OptimizerInfo(_prodigy, "prodigyopt", finds_rate=True),
    "adafactor": OptimizerInfo(_adafactor, "transformers", elementwise=False),
    "schedule_free": OptimizerInfo(_schedule_free, "schedulefree", lr_scheduler="constant"),
}


def check_optimizer(name: str, device: str) -> None:
    """Raises `Refused` (69) where the optimiser's package is not installed, or (2) does not compute on the device."""
    _package(name)
    if device == "mps" and OPTIMIZERS[name].package == "bitsandbytes":
        raise Refused(f"--optimizer {name}: bitsandbytes does not compute it on the mps device; take adamw")


def grouped(
    parameters: Iterable[tuple[float, list[torch.nn.Parameter]]], kept: Iterable[torch.nn.Parameter] = ()
) -> Groups:
    """Groups of an optimiser, of (peak learning rate, parameters); each keeps its peak as `peak`.

    Weights in `kept` do not decay: towards zero, DoRA's magnitudes would take the base with them.
    """
    spared = {id(parameter) for parameter in kept}
    groups: Groups = []
    for rate, params in parameters:
        decaying = [parameter for parameter in params if id(parameter) not in spared]
        groups.append({"params": decaying, "lr": rate, "peak": rate})
        if still := [parameter for parameter in params if id(parameter) in spared]:
            groups.append({"params": still, "lr": rate, "peak": rate, "weight_decay": 0.0})
    return groups


def make_optimizer(name: str, groups: Groups, weight_decay: float, flat: Flat | None = None) -> torch.optim.Optimizer:
    """The optimiser over `grouped` parameters; one that is elementwise over those of `flat`, one for each group."""
    if flat and OPTIMIZERS[name].elementwise:
        groups = [group | {"params": [one]} for group, one in zip(groups, flat.groups, strict=True)]
    with redirect_stdout(StringIO()):  # prodigyopt prints, into events that programs read
        optimizer = OPTIMIZERS[name].make(_package(name), groups, weight_decay)
    if train := getattr(optimizer, "train", None):  # schedule-free has two points, and must be told which
        train()
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group's rate to its share of the peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def _package(name: str) -> Any:
    package = OPTIMIZERS[name].package
    try:
        return import_module(package)
    except ImportError:
        raise Refused(f'--optimizer {name} needs {package}: pip install "scumble[optimizers]"', UNAVAILABLE) from None
