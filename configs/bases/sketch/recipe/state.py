"""Training state of the recipe, written atomically so that an interrupted run can resume."""

import time
from pathlib import Path
from typing import Any

import torch

from ....atomic import atomic_write


def save_state(path: Path, step: int, **parts: Any) -> None:
    """Write `step` and the state dict of each part; a crash while writing keeps the previous file."""
    with atomic_write(path) as temporary:
        torch.save({"step": step} | {name: part.state_dict() for name, part in parts.items()}, temporary)


def load_state(path: Path, **parts: Any) -> int:
    """Load each part from `path` if it exists; returns the number of completed steps, 0 for a new run."""
    if not path.exists():
        return 0
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["step"]


class Clock:
    """Prints the mean of the logged values and the time per step, every `every` steps."""

    def __init__(self, name: str, first: int, steps: int, every: int = 100):
        self.name, self.steps, self.every = name, steps, every
        self.started, self.since = time.monotonic(), first
        self.sums: dict[str, torch.Tensor] = {}

    def tick(self, step: int, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros(())) + value.cpu()
        if (step + 1) % self.every == 0:
            count = step + 1 - self.since
            seconds = (time.monotonic() - self.started) / count
            shown = "  ".join(f"{name} {float(total) / count:.5f}" for name, total in self.sums.items())
            print(f"{self.name} {step + 1}/{self.steps}  {shown}  {seconds * 1000:.0f} ms/step", flush=True)
            self.started, self.since, self.sums = time.monotonic(), step + 1, {}
