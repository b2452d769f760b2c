"""One optimiser step at a time: the gradients of its batches, clipped, checked before they are applied."""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from .optimizers import set_rate
from .step import Look, Objectives, seed_for


@dataclass(frozen=True)
class Outcome:
    """Mean weighted loss of a step; `broken` names what of it is not finite (then nothing was applied), else ""."""

    loss: float
    broken: str = ""


class Update:
    """Trained parameters with their optimiser and, where `ema` is not 0, their moving average."""

    def __init__(
        self,
        accelerator: Accelerator,
        objectives: Objectives,
        optimizer: torch.optim.Optimizer,
        clip: float,
        ema: float,
    ):
        self.accelerator, self.objectives, self.clip, self.ema = accelerator, objectives, clip, ema
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # accelerate unscales gradients in fp16
        self.optimizer: AcceleratedOptimizer = accelerator.prepare(optimizer)
        self.average = [parameter.detach().clone() for parameter in self.parameters] if ema else []

    def take(self, step: int, batches: Sequence[Sequence[int]], rate_share: float) -> Outcome:
        """Optimiser step `step` (from 0) over batches of example indices, at a share of the peak rates."""
        torch.manual_seed(seed_for(self.objectives.seed, step, "dropout"))
        set_rate(self.optimizer, rate_share)
        loss = float(self.gradients(step, batches))
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.clip or math.inf)
        scaled = self.accelerator.scaler is not None  # fp16: the scaler leaves out a step whose gradient overflows
        broken = "" if math.isfinite(loss) else "loss"
        if not (broken or scaled or torch.isfinite(norm)):
            broken = "gradient"
        if not broken:
            self.optimizer.step()
            for mean, parameter in zip(self.average, self.parameters, strict=False):
                mean.lerp_(parameter.detach(), 1 - self.ema)
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(loss, broken)

    def gradients(self, step: int, batches: Sequence[Sequence[int]]) -> torch.Tensor:
        """Add the gradients of a step to the parameters'; its mean weighted loss (a scalar)."""
        num_looks = sum(map(len, batches))
        total, slot = torch.zeros((), device=self.accelerator.device), 0
        for batch in batches:
            looks = [Look(index, step, slot + position) for position, index in enumerate(batch)]
            slot += len(batch)
            with self.accelerator.autocast():
                loss = self.objectives.losses(looks).sum() / num_looks
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def trial(self, batch: Sequence[int]) -> None:
        """One pass of a batch that leaves nothing behind."""
        self.gradients(0, [batch])
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def finished_weights(self) -> Generator[None]:
        """Within the block the parameters are those to look at and to keep: their moving average where one is kept.

        A schedule-free optimiser trains at another point than the one that it finds; its `eval` goes there, `train`
        back.
        """
        own: Any = self.optimizer.optimizer
        switches = hasattr(own, "eval")
        if switches:
            own.eval()
        live = [parameter.detach().clone() for parameter in self.parameters] if self.average else []
        for parameter, mean in zip(self.parameters, self.average, strict=False):
            parameter.data.copy_(mean)
        try:
            yield
        finally:
            for parameter, value in zip(self.parameters, live, strict=False):
                parameter.data.copy_(value)
            if switches:
                own.train()
