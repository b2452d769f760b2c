"""One step before the run, measured: how long it takes, what it needs, and whether activations must be recomputed."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from scumble.configs.errors import Refused

from .machine import memory_mb

QUICK_S = 2.0


@dataclass(frozen=True)
class Measured:
    """What one forward and backward pass of the largest batch took; `checkpointing` is what was needed for it."""

    seconds: float
    memory_mb: int
    checkpointing: bool


def measure(
    trial: Callable[[], None], device: torch.device, checkpointing: bool | str, recompute: Callable[[], None], cure: str
) -> Measured:
    """Run `trial`, a pass that leaves nothing behind, and time it (again, where it is quick: the first warms up).

    `checkpointing` "auto": where the trial does not fit into the device's memory, `recompute` is called once and the
    trial repeated. Raises `Refused` with the `cure` where it does not fit then either.
    """
    chosen = checkpointing is True
    if chosen:
        recompute()
    try:
        seconds = _timed(trial, device)
    except torch.OutOfMemoryError:
        if checkpointing != "auto":
            raise _too_large(device, cure) from None
        chosen = True
        torch.cuda.empty_cache()
        recompute()
        try:
            seconds = _timed(trial, device)
        except torch.OutOfMemoryError:
            raise _too_large(device, cure) from None
    if seconds < QUICK_S:
        seconds = _timed(trial, device)
    return Measured(seconds, memory_mb(device), chosen)


def duration(seconds: float) -> str:
    """A time as people say it: 45 s, 3 min, 1 h 20 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _timed(trial: Callable[[], None], device: torch.device) -> float:
    started = time.monotonic()
    trial()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - started


def _too_large(device: torch.device, cure: str) -> Refused:
    return Refused(f"a step does not fit into the memory of the {device.type} device: {cure}", 69)
