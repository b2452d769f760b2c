"""Too little memory, noticed and met; and one step before the run, measured: how long it takes and what it needs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import UNAVAILABLE

from .device import free_unused, is_out_of_memory, memory_mb, reset_peak_memory, synchronize

PATIENCE_S, TRIALS = 10.0, 3  # so many that on a CPU the last of them runs what the others recorded
T = TypeVar("Found")


class TooLarge(Refused):
    """What was to be computed does not fit into memory, however it is cut."""


@dataclass(frozen=True)
class StepCost:
    """What one forward and backward pass of the largest batch took."""

    seconds: float
    memory_mb: int


def measure(trial: Callable[[], None], device: torch.device, need_less: Callable[[], bool], cure: str) -> StepCost:
    """Run `trial`, a pass that leaves nothing behind, and time it; where it is quick, the quickest of some: the first
    warms up, and another program may be in the way of one.

    Where one does not fit into the device's memory, `need_less` takes the next way to need less, and all are tried
    again. Raises `Refused` (69) with the `cure` where no way is left.
    """
    times: list[float] = []
    while not times or (len(times) < TRIALS and sum(times) < PATIENCE_S):
        if not times:
            reset_peak_memory(device)  # once: a pass that was captured in the first takes no more memory in the others
        seconds = unless_too_large(lambda: timed(trial, device))
        if seconds is not None:
            times.append(seconds)
        elif need_less():
            times.clear()
        else:
            raise TooLarge(f"a step does not fit into the memory of the {device.type} device: {cure}", UNAVAILABLE)
    return StepCost(min(times), memory_mb(device))


def unless_too_large(compute: Callable[[], T]) -> T | None:
    """What `compute` gives; None where it does not fit into memory, which is free again then."""
    try:
        return compute()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    free_unused()  # only here: inside `except` the traceback still holds every activation
    return None


def timed(trial: Callable[[], None], device: torch.device) -> float:
    """Seconds of a trial, all that it queued on the device included."""
    started = time.monotonic()
    trial()
    synchronize(device)
    return time.monotonic() - started
