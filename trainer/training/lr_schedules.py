"""Learning-rate schedules as pure functions of the step, so that a resumed run follows the same curve."""

import math
from collections.abc import Callable


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0 (Loshchilov and Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def rex(progress: float) -> float:
    """(1 - p) / (1/2 + (1 - p)/2): high for long, then quickly down (Chen et al. 2021, eq. 1)."""
    return (1 - progress) / (0.5 + 0.5 * (1 - progress))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "constant_with_warmup": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": cosine,
    "cosine_with_restarts": cosine,
    "rex": rex,
}


def num_warmup_steps(lr_scheduler: str, lr_warmup_steps: float, num_steps: int) -> int:
    """The length of the warm-up: `lr_warmup_steps` if it is 1 or more, else that share of the run; 0 for constant."""
    if lr_scheduler == "constant":
        return 0
    return round(lr_warmup_steps * num_steps if lr_warmup_steps < 1 else lr_warmup_steps)


def lr_multiplier(lr_scheduler: str, step: int, num_steps: int, lr_warmup_steps: float, num_cycles: int = 1) -> float:
    """Multiplier of the peak learning rate in optimizer step `step` (from 0) of `num_steps`, in [0, 1].

    The rate rises linearly during the warm-up, then follows the schedule. It is never 0 in the first step; the
    schedule would reach its end one step after the last.
    """
    warmup = num_warmup_steps(lr_scheduler, lr_warmup_steps, num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    if lr_scheduler == "cosine_with_restarts":
        progress = progress * num_cycles % 1.0
    return SCHEDULES[lr_scheduler](progress)
