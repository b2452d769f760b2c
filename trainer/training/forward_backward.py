"""Forward and backward passes over training samples, run eagerly or replayed from a capture."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from ..kernels.capture import Capture, Captured
from .flat_parameters import FlatParameters
from .objective import Batch, Sample


class Differentiable(Protocol):
    """The losses of samples in two stages: the inputs of a pass, and the pass, which never waits for the device."""

    seed: int

    def batch(self, samples: Sequence[Sample]) -> Batch: ...
    def losses_of(self, batch: Batch) -> torch.Tensor: ...


class Passes:
    """Adds gradients to those of `flat`.

    `backward` is accelerate's, `autocast` accelerate's where it is needed; for `capture` and `report` see `Captured`.
    """

    def __init__(
        self,
        objectives: Differentiable,
        flat: FlatParameters,
        backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        capture: Capture | None = None,
        report: Callable[[str], None] = lambda line: None,
    ):
        self.objectives, self.flat, self.backward, self.autocast = objectives, flat, backward, autocast
        self.captured = Captured(self._run, capture, report, flat.gradients)
        self.prepared: dict[tuple[Sample, ...], Batch] = {}
        self.is_compiled = False

    def __call__(self, samples: Sequence[Sample], divisor: float) -> torch.Tensor:
        """Add the gradient of the summed loss / divisor. Returns the sum, a scalar that the next call may overwrite."""
        batch = self.prepared.pop(tuple(samples), None) or self.objectives.batch(samples)
        batch["divisor"] = torch.full((), divisor, device=self.flat.groups[0].device)
        return self.captured(batch)

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Prepare the inputs of the next pass while the device computes this one."""
        self.prepared = {tuple(samples): self.objectives.batch(samples)}

    def forget(self) -> bool:
        """Release the captures, because the pass changes or memory is needed. Returns whether there were any."""
        return self.captured.forget()

    def set_compiled(self, is_compiled: bool) -> None:
        """Set whether the modules are compiled from now on. On a CPU, compiled modules are not captured as well."""
        self.forget()
        self.is_compiled = is_compiled
        if is_compiled and self.flat.groups[0].device.type == "cpu":
            self.captured.disable()

    def _run(self, batch: Batch) -> torch.Tensor:
        with self.autocast():
            loss = self.objectives.losses_of(batch).sum()
        self.backward(loss / batch["divisor"])
        return loss.detach()
