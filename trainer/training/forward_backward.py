"""Forward and backward passes of looks, run or captured."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from ..kernels.capture import Capture, Captured
from .flat_parameters import Flat
from .objective import Batch, Sample


class Differentiable(Protocol):
    """Losses of looks, in two steps: what a pass needs, and the pass, which never waits for the device."""

    seed: int

    def batch(self, looks: Sequence[Sample]) -> Batch: ...
    def losses_of(self, batch: Batch) -> torch.Tensor: ...


class Passes:
    """Adds gradients to those of `flat`. `backward` is that of accelerate, `surroundings` its autocast where needed;
    of `capture` and `say` see `Captured`."""

    def __init__(
        self,
        objectives: Differentiable,
        flat: Flat,
        backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
        surroundings: Callable[[], AbstractContextManager[object]] = nullcontext,
        capture: Capture | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.objectives, self.flat, self.backward, self.surroundings = objectives, flat, backward, surroundings
        self.captured = Captured(self._run, capture, say, flat.gradients)
        self.prepared: dict[tuple[Sample, ...], Batch] = {}

    def __call__(self, looks: Sequence[Sample], divisor: float) -> torch.Tensor:
        """Add the gradient of the looks' summed loss / divisor; the sum, a scalar that the next call may overwrite."""
        batch = self.prepared.pop(tuple(looks), None) or self.objectives.batch(looks)
        batch["divisor"] = torch.full((), divisor, device=self.flat.groups[0].device)
        return self.captured(batch)

    def prepare(self, looks: Sequence[Sample]) -> None:
        """Make ready what the next pass needs, while the device is busy with this one."""
        self.prepared = {tuple(looks): self.objectives.batch(looks)}

    def forget(self) -> bool:
        """Drop what was captured, since the pass is another from now on, or its memory is needed; False where there was
        nothing."""
        return self.captured.forget()

    def disable_capture(self) -> None:
        """Capture no more."""
        self.captured.disable()

    def _run(self, batch: Batch) -> torch.Tensor:
        with self.surroundings():
            loss = self.objectives.losses_of(batch).sum()
        self.backward(loss / batch["divisor"])
        return loss.detach()
