"""Handle out-of-memory errors, and measure the time and memory of a training step before the run."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import UNAVAILABLE

from .device import free_unused, is_out_of_memory, memory_mb, reset_peak_memory, synchronize

MAX_TRIALS_S, TRIALS = 10.0, 3  # on a CPU, the third trial is the first to replay what the others recorded
T = TypeVar("T")


class TooLarge(Refused):
    """A computation does not fit into memory, even when split into the smallest parts."""


@dataclass(frozen=True)
class StepCost:
    """Time and peak memory of one forward and backward pass of the largest batch."""

    seconds: float
    memory_mb: int


def measure(trial: Callable[[], None], device: torch.device, need_less: Callable[[], bool], fix: str) -> StepCost:
    """Time `trial`, a pass without side effects. Short trials are repeated and the fastest counts.

    The first trial warms up, and other programs may slow down any of them. If a trial runs out of device memory,
    `need_less` reduces memory use and all trials start again. Raises `Refused` (69) with the `fix` if `need_less`
    returns False.
    """
    times: list[float] = []
    while not times or (len(times) < TRIALS and sum(times) < MAX_TRIALS_S):
        if not times:
            reset_peak_memory(device)  # only once: later trials replay the captured pass, which allocates nothing
        seconds = unless_too_large(lambda: timed(trial, device))
        if seconds is not None:
            times.append(seconds)
        elif need_less():
            times.clear()
        else:
            raise TooLarge(f"a step does not fit into the memory of the {device.type} device: {fix}", UNAVAILABLE)
    return StepCost(min(times), memory_mb(device))


def unless_too_large(compute: Callable[[], T]) -> T | None:
    """Return the result of `compute`, or free its memory and return None if it does not fit."""
    try:
        return compute()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    free_unused()  # not inside `except`, where the traceback still holds every activation
    return None


def timed(trial: Callable[[], None], device: torch.device) -> float:
    """Duration of a trial in seconds, including the work that it queued on the device."""
    started = time.monotonic()
    trial()
    synchronize(device)
    return time.monotonic() - started
