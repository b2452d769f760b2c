"""Learning-rate schedules: the share of the peak rate at a step, a pure function, so that a resumed run agrees."""

import math
from collections.abc import Callable


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0 (Loshchilov and Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def rex(progress: float) -> float:
    """(1 - p) / (1/2 + (1 - p)/2): high for long, then quickly down (Chen et al. 2021, eq. 1)."""
    return (1 - progress) / (0.5 + 0.5 * (1 - progress))


SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": cosine,
    "cosine_restarts": cosine,
    "rex": rex,
}


def rate_share(schedule: str, step: int, num_steps: int, warm_up: float, restarts: int = 1) -> float:
    """Share of the peak rate in optimiser step `step` (from 0) of `num_steps`, in [0, 1].

    The rate rises linearly over the first `warm_up` share of the run, then follows the shape; the first step is
    never 0, and the shape would reach its end one step after the last.
    """
    warm_steps = round(warm_up * num_steps)
    if step < warm_steps:
        return (step + 1) / (warm_steps + 1)
    progress = (step - warm_steps) / max(1, num_steps - warm_steps)
    if schedule == "cosine_restarts":
        progress = progress * restarts % 1.0
    return SHAPES[schedule](progress)
