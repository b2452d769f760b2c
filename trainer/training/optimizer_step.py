"""One optimizer step: the gradients of its batches, clipped, checked, applied, and the moving average (EMA).

A step whose loss or gradient is not finite is skipped; after some in a row the learning rate is halved, after more the
run is hopeless. A CUDA device decides by itself whether it applies a step, so that the next step is queued before the
numbers of this one are read.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..system.device import AsyncValue, set_seed
from .flat_parameters import FlatParameters
from .forward_backward import Passes
from .memory_fallback import MemoryFallback
from .objective import Sample, seed_for
from .optimizers import set_learning_rate

HALVED_AFTER, STOPPED_AFTER = 3, 12  # steps in a row that are not finite
AVERAGE = "average."  # prefix of the moving average's tensors in a state
CLIP_EPSILON = 1e-6  # as in torch: norms just below the limit are scaled too


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of a step: the learning rate of the first group and the mean weighted loss.

    `non_finite` is "loss" or "gradient" if that is not finite (then nothing was applied), else "". `is_hopeless` is
    true after too many such steps in a row.
    """

    step: int
    learning_rate: float
    loss: float
    non_finite: str = ""
    is_hopeless: bool = False


def samples_of(step: int, batch: Sequence[int], first: int = 0) -> list[Sample]:
    """The training samples of a batch of example indices; `first` is the position of the first one in the step."""
    return [Sample(index, step, first + number) for number, index in enumerate(batch)]


class OptimizerStep:
    """Applies optimizer steps to trained parameters (by name), with a moving average of them if `ema_decay` is not 0.

    `samples_per_step` is the mean number of samples in a step, by which gradients are divided; 0: the number of each
    step. `lr_factor` multiplies the learning rate. `report` is called with a line about each skipped step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        passes: Passes,
        parameters: Mapping[str, torch.nn.Parameter],
        flat: FlatParameters,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        ema_decay: float,
        fallback: MemoryFallback | None = None,
        report: Callable[[str], None] = lambda line: None,
        samples_per_step: float = 0.0,
        lr_factor: float = 1.0,
        non_finite_in_a_row: int = 0,
    ):
        self.accelerator, self.passes, self.report = accelerator, passes, report
        self.max_grad_norm, self.ema_decay = max_grad_norm, ema_decay
        self.named, self.flat = dict(parameters), flat
        self.fallback = fallback or MemoryFallback(passes, accelerator.device, report)
        self.samples_per_step = samples_per_step
        self.lr_factor, self.non_finite_in_a_row = lr_factor, non_finite_in_a_row
        self.peaks = [(group["peak"], group["weight_decay"]) for group in optimizer.param_groups]
        self.optimizer: AcceleratedOptimizer = accelerator.prepare(optimizer)  # it unscales gradients in fp16
        self.average = [values.detach().clone() for values in flat.groups] if ema_decay else []
        # torch marks optimizers that check by themselves whether a step is finite; in fp16 accelerate waits for that
        checks_itself = getattr(optimizer, "_step_supports_amp_scaling", False) and accelerator.scaler is None
        self.max_queued = 1 if checks_itself and accelerator.device.type == "cuda" else 0
        self.queued: deque[tuple[int, float, AsyncValue]] = deque()

    def take(
        self, step: int, batches: Sequence[Sequence[int]], lr_multiplier: float, next_batch: Sequence[int] = ()
    ) -> None:
        """Take optimizer step `step` (from 0) over batches of example indices; read what it gave from `outcomes`.

        `next_batch`, the first batch of the next step, is prepared while a CUDA device computes. Raises `TooLarge` (75)
        if the step does not fit into memory.
        """
        set_learning_rate(self.optimizer, lr_multiplier * self.lr_factor)
        loss = self.fallback.fit(step, max(map(len, batches)), lambda: self.gradients(step, batches))
        if self.max_queued:
            numbers = self._apply_without_waiting(loss)
        else:
            if next_batch and loss.is_cuda:
                self.passes.prepare(samples_of(step + 1, next_batch)[: self.fallback.micro_batch or len(next_batch)])
            numbers = self._apply(loss)
        self.queued.append((step, self.optimizer.param_groups[0]["lr"], AsyncValue(numbers)))

    def outcomes(self, wait: bool = True) -> Iterator[StepOutcome]:
        """The outcome of each step, once, in order. Without `wait`, skip the steps that a device may still compute."""
        while len(self.queued) > (0 if wait else self.max_queued):
            step, learning_rate, numbers = self.queued.popleft()
            loss, norm = numbers.values()
            non_finite = self._non_finite(loss, norm)
            if non_finite:
                self._skip(step, non_finite)
            else:
                self.non_finite_in_a_row = 0
            yield StepOutcome(step, learning_rate, loss, non_finite, self.non_finite_in_a_row >= STOPPED_AFTER)

    def gradients(self, step: int, batches: Sequence[Sequence[int]]) -> torch.Tensor:
        """Set the gradients of the parameters to those of a step. Returns the mean weighted loss, a scalar tensor.

        The gradients are those of the sum over the samples, divided by the usual number of samples in a step: a sample
        has the same weight in a small last batch, and the same random numbers however many share a pass.
        """
        set_seed(seed_for(self.passes.objectives.seed, step, "dropout"), self.accelerator.device)
        self.flat.zero_grad()
        self.flat.lower()
        num_samples = sum(map(len, batches))
        loss, first = torch.zeros((), device=self.accelerator.device), 0
        for batch in batches:
            samples = samples_of(step, batch, first)
            first += len(batch)
            at_once = self.fallback.micro_batch or len(samples)
            for start in range(0, len(samples), at_once):
                part = samples[start : start + at_once]
                loss += self.passes(part, self.samples_per_step or num_samples) / num_samples
        return loss

    def trial(self, batch: Sequence[int], step: int = 0) -> None:
        """One forward and backward pass with the random numbers of `step`; it changes nothing.

        Meanwhile as much memory is reserved as the two moments of an optimizer need.
        """
        moments = [torch.empty_like(one) for one in 2 * self.flat.groups] if not self.optimizer.state else []
        try:
            self.gradients(step, [batch])
        finally:
            del moments
            self.flat.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The live parameters and their moving average by name, as a state stores them."""
        if not self.average:
            return dict(self.named)
        averages = {AVERAGE + name: self.flat.of(self.average, parameter) for name, parameter in self.named.items()}
        return {**self.named, **averages}

    def optimizer_state(self) -> dict[str, Any]:
        """The state of the optimizer and, in fp16, of the loss scaler."""
        scaler = self.accelerator.scaler
        return {"optimizer": self.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor], optimizer: Mapping[str, Any]) -> None:
        """Restore what `tensors` and `optimizer_state` returned. Peak learning rates and weight decay do not change."""
        for name, parameter in self.named.items():
            parameter.copy_(tensors[name])
            if self.average:
                self.flat.of(self.average, parameter).copy_(tensors[AVERAGE + name])
        self.optimizer.load_state_dict(optimizer["optimizer"])
        for group, (peak, decay) in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["peak"], group["weight_decay"] = peak, decay
        if self.accelerator.scaler is not None and optimizer["scaler"]:
            self.accelerator.scaler.load_state_dict(optimizer["scaler"])

    @contextmanager
    def finished_weights(self) -> Generator[None]:
        """Within the block the parameters are those to preview and save: their moving average, if there is one.

        A schedule-free optimizer trains at another point than the one it finds: its `eval` goes there, `train` back.
        Afterwards the live parameters are restored bit for bit.
        """
        own: Any = self.optimizer.optimizer
        has_two_points = hasattr(own, "eval")
        groups = self.flat.groups
        live = [values.detach().clone() for values in groups] if self.average or has_two_points else []
        if has_two_points:
            own.eval()
        for values, mean in zip(groups, self.average, strict=False):
            values.data.copy_(mean)
        self.flat.lower()
        try:
            yield
        finally:
            if has_two_points:
                own.train()
            for values, value in zip(groups, live, strict=False):
                values.data.copy_(value)

    def _apply(self, loss: torch.Tensor) -> torch.Tensor:
        """Apply the gradients if loss and norm are finite. Returns both as a tensor (2,); waits for the device."""
        loss_value, norm = float(loss), 0.0
        if math.isfinite(loss_value):
            norm = self._clip()
        if not self._non_finite(loss_value, norm):
            self.optimizer.step()
            for mean, values in zip(self.average, self.flat.groups, strict=False):
                mean.lerp_(values.detach(), 1 - self.ema_decay)
        return torch.tensor([loss_value, norm])

    def _apply_without_waiting(self, loss: torch.Tensor) -> torch.Tensor:
        """The same, checked by the device: the optimizer gets `found_inf`, as from `GradScaler`."""
        norm = get_total_norm(self.flat.gradients)
        if self.max_grad_norm:
            clip_grads_with_norm_(self.flat.groups, self.max_grad_norm, norm)
        numbers = torch.stack([loss, norm])
        is_finite = numbers.isfinite().all().float()
        own: Any = self.optimizer.optimizer
        own.found_inf = 1 - is_finite
        try:
            self.optimizer.step()
        finally:
            del own.found_inf
        for mean, values in zip(self.average, self.flat.groups, strict=False):
            mean.lerp_(values.detach(), is_finite * (1 - self.ema_decay))
        return numbers

    def _non_finite(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return "loss"
        return "gradient" if not math.isfinite(norm) and self.accelerator.scaler is None else ""  # fp16 skips by itself

    def _clip(self) -> float:
        """Scale the gradients down to the limit (Pascanu et al. 2013). Returns their norm before.

        As torch's `clip_grad_norm_`, without the product by 1 below the limit. In fp16 gradients are unscaled first.
        """
        self.accelerator.unscale_gradients()
        norm = get_total_norm(self.flat.gradients)
        value = float(norm)
        if self.max_grad_norm and value + CLIP_EPSILON > self.max_grad_norm:
            clip_grads_with_norm_(self.flat.groups, self.max_grad_norm, norm)
        return value

    def _skip(self, step: int, non_finite: str) -> None:
        self.non_finite_in_a_row += 1
        line = f"step {step + 1}: the {non_finite} is not finite; the step is skipped"
        if self.non_finite_in_a_row % HALVED_AFTER == 0 and self.non_finite_in_a_row < STOPPED_AFTER:
            self.lr_factor /= 2
            line += f", and after {self.non_finite_in_a_row} in a row the learning rate is halved"
        self.report(line)
