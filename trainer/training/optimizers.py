"""Optimizers by name. Those of the [optimizers] extra are imported when used, and refused if they are not installed."""

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

from .flat_parameters import FlatParameters

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerInfo:
    """How to make an optimizer, from which package, and the defaults that suit it.

    `lr_multiple` is its learning rate as a multiple of AdamW's. If `is_self_tuning`, it estimates the learning rate
    itself, and the option multiplies its estimate. `lr_scheduler` is what its authors recommend. An optimizer that is
    not `elementwise` depends on the shape of each tensor.
    """

    make: Callable[[Any, Groups, float], torch.optim.Optimizer]
    package: str = "torch"
    lr_multiple: float = 1.0
    is_self_tuning: bool = False
    lr_scheduler: str = "cosine"
    elementwise: bool = True


def _adamw(torch_: Any, groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)  # Loshchilov and Hutter 2019


def _adafactor(transformers: Any, groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    """Shazeer and Stern 2018 with absolute learning rates: relative to the weights, a LoRA would never leave 0."""
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
    "prodigy": OptimizerInfo(_prodigy, "prodigyopt", is_self_tuning=True),
    "adafactor": OptimizerInfo(_adafactor, "transformers", elementwise=False),
    "schedule_free": OptimizerInfo(_schedule_free, "schedulefree", lr_scheduler="constant"),
}


def check_optimizer(name: str, device: str) -> None:
    """Raises `Refused` (69) if the optimizer's package is not installed, (2) if it does not support the device."""
    _package(name)
    if device == "mps" and OPTIMIZERS[name].package == "bitsandbytes":
        raise Refused(f"--optimizer {name}: bitsandbytes does not support the mps device; use adamw")


def param_groups(
    parameters: Iterable[tuple[float, list[torch.nn.Parameter]]], no_decay: Iterable[torch.nn.Parameter] = ()
) -> Groups:
    """The parameter groups of an optimizer from pairs of (peak learning rate, parameters); `peak` keeps the peak.

    Parameters in `no_decay` get no weight decay: the magnitudes of DoRA would pull the base weights towards 0.
    """
    excluded = {id(parameter) for parameter in no_decay}
    groups: Groups = []
    for peak, params in parameters:
        decaying = [parameter for parameter in params if id(parameter) not in excluded]
        groups.append({"params": decaying, "lr": peak, "peak": peak})
        if constant := [parameter for parameter in params if id(parameter) in excluded]:
            groups.append({"params": constant, "lr": peak, "peak": peak, "weight_decay": 0.0})
    return groups


def make_optimizer(
    name: str, groups: Groups, weight_decay: float, flat: FlatParameters | None = None
) -> torch.optim.Optimizer:
    """The optimizer over `groups`; an elementwise one updates the flat parameters of `flat` instead."""
    if flat and OPTIMIZERS[name].elementwise:
        groups = [group | {"params": [one]} for group, one in zip(groups, flat.groups, strict=True)]
    with redirect_stdout(StringIO()):  # prodigyopt prints, and stdout is for events
        optimizer = OPTIMIZERS[name].make(_package(name), groups, weight_decay)
    if train := getattr(optimizer, "train", None):  # schedule-free starts in eval mode
        train()
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Set the learning rate of every group to its peak times `multiplier`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * multiplier


def _package(name: str) -> Any:
    package = OPTIMIZERS[name].package
    try:
        return import_module(package)
    except ImportError:
        raise Refused(
            f'--optimizer {name}: {package} is not installed; run pip install "scumble[optimizers]"', UNAVAILABLE
        ) from None
