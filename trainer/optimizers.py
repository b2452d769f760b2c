"""Optimisers by name. Those of the extra [optimizers] are refused by name, with the install command, when absent."""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch

from scumble.configs.errors import Refused

Groups = list[dict[str, Any]]


def _adamw(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    fused = all(p.device.type in ("cuda", "cpu", "mps") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=fused)


def _adafactor(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, weight_decay=weight_decay)


def _adamw8bit(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    return _extra("bitsandbytes", "adamw8bit").optim.AdamW8bit(groups, weight_decay=weight_decay)


def _lion(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    return _extra("lion_pytorch", "lion").Lion(groups, weight_decay=weight_decay)


def _prodigy(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    options = {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
    return _extra("prodigyopt", "prodigy").Prodigy(groups, weight_decay=weight_decay, **options)


def _schedule_free(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    return _extra("schedulefree", "schedule_free").AdamWScheduleFree(groups, weight_decay=weight_decay)


MAKERS: dict[str, Callable[[Groups, float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "lion": _lion,
    "prodigy": _prodigy,
    "adafactor": _adafactor,
    "schedule_free": _schedule_free,
}
PACKAGES = {
    "adamw8bit": "bitsandbytes",
    "lion": "lion_pytorch",
    "prodigy": "prodigyopt",
    "schedule_free": "schedulefree",
}


def check_optimizer(name: str) -> None:
    """Raises `Refused` (69) where the optimiser's package is not installed."""
    if name in PACKAGES:
        _extra(PACKAGES[name], name)


def make_optimizer(
    name: str, parameters: Iterable[tuple[float, list[torch.nn.Parameter]]], weight_decay: float
) -> torch.optim.Optimizer:
    """The optimiser over groups of (peak learning rate, parameters); each group keeps its peak as `peak`."""
    groups = [{"params": params, "lr": rate, "peak": rate} for rate, params in parameters]
    return MAKERS[name](groups, weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group's rate to its share of the peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def _extra(package: str, name: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise Refused(f'--optimizer {name} needs {package}: pip install "scumble[optimizers]"', 69) from None
