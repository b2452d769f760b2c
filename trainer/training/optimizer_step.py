"""One optimiser step at a time: the gradients of its batches, clipped, checked before they are applied.

What goes wrong here is met here: a step whose numbers are not finite is left out (after some in a row the rate is
halved), and one that does not fit into memory is tried again with less at once, at the same effective batch.

A CUDA device decides by itself whether it applies a step, so that the next is queued before its numbers are read.
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

from scumble.configs.words import counted

from ..system.device import AsyncValue, free_unused, set_seed
from ..system.out_of_memory import TooLarge, unless_too_large
from .flat_parameters import Flat
from .forward_backward import Passes
from .objective import Sample, seed_for
from .optimizers import set_rate

HALVED_AFTER, STOPPED_AFTER = 3, 12
AVERAGE = "average."
CLIP_EPSILON = 1e-6  # torch's: norms just below the limit are scaled, too


@dataclass(frozen=True)
class StepOutcome:
    """A step's rate (of the first group) and mean weighted loss; `non_finite` names what of it is not finite (then nothing
    was applied), else ""."""

    step: int
    learning_rate: float
    loss: float
    non_finite: str = ""


def samples_of(step: int, batch: Sequence[int], slot: int = 0) -> list[Sample]:
    """The looks at a batch of example indices, the first of them in a slot."""
    return [Sample(index, step, slot + position) for position, index in enumerate(batch)]


class Update:
    """Trained parameters by name, flat, with their optimiser and, where `ema` is not 0, their moving average.

    `looks_per_step` is the mean number of looks in a step; 0 divides by those of each step. Each of `recompute` turns
    gradient checkpointing on for more blocks; `quantize` gives the base fewer bits and tells how many, 0 where none are
    left, or is None where that is forbidden. `say` is told what was changed to go on.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        passes: Passes,
        parameters: Mapping[str, torch.nn.Parameter],
        flat: Flat,
        optimizer: torch.optim.Optimizer,
        clip: float,
        ema: float,
        say: Callable[[str], None] = lambda line: None,
        looks_per_step: float = 0.0,
    ):
        self.accelerator, self.passes, self.clip, self.ema, self.say = accelerator, passes, clip, ema, say
        self.named, self.flat = dict(parameters), flat
        self.looks_per_step = looks_per_step
        self.peaks = [(group["peak"], group["weight_decay"]) for group in optimizer.param_groups]
        # accelerate unscales gradients in fp16
        self.optimizer: AcceleratedOptimizer = accelerator.prepare(optimizer)
        self.average = [values.detach().clone() for values in flat.groups] if ema else []
        self.recompute: list[Callable[[], None]] = []
        self.quantize: Callable[[], int] | None = None
        self.rate_factor, self.broken_in_a_row, self.micro_batch, self.is_compiled = 1.0, 0, 0, False
        self.recomputed = 0  # steps of `recompute` that are taken
        # torch's mark of optimisers that look themselves whether a step is finite; in fp16 accelerate waits for it
        looks_itself = getattr(optimizer, "_step_supports_amp_scaling", False) and accelerator.scaler is None
        self.ahead = 1 if looks_itself and accelerator.device.type == "cuda" else 0
        self.taken: deque[tuple[int, float, AsyncValue]] = deque()

    def take(self, step: int, batches: Sequence[Sequence[int]], rate_share: float, after: Sequence[int] = ()) -> None:
        """Optimiser step `step` (from 0) over batches of example indices, at a share of the peak rates.

        `after`, the first batch of the next step, is made ready while a CUDA device that is waited for computes.
        Raises `Refused` (75) where it does not fit into memory, however it is cut.
        """
        set_rate(self.optimizer, rate_share * self.rate_factor)
        total = self._fitting_gradients(step, batches)
        if self.ahead:
            numbers = self._apply_unseen(total)
        else:
            if after and total.is_cuda:
                self.passes.prepare(samples_of(step + 1, after)[: self.micro_batch or len(after)])
            numbers = self._apply(total)
        self.flat.zero_grad()
        self.taken.append((step, self.optimizer.param_groups[0]["lr"], AsyncValue(numbers)))

    def outcomes(self, of_all: bool = True) -> Iterator[StepOutcome]:
        """What came of the steps taken, each told once, in order; but for the last `ahead`, of which a device may still
        be busy with one, unless `of_all` is asked for."""
        while len(self.taken) > (0 if of_all else self.ahead):
            step, rate, numbers = self.taken.popleft()
            loss, norm = numbers.values()
            broken = self._broken(loss, norm)
            if broken:
                self._leave_out(step, broken)
            else:
                self.broken_in_a_row = 0
            yield StepOutcome(step, rate, loss, broken)

    @property
    def is_hopeless(self) -> bool:
        """So many steps in a row were not finite that going on makes no sense."""
        return self.broken_in_a_row >= STOPPED_AFTER

    def gradients(self, step: int, batches: Sequence[Sequence[int]]) -> torch.Tensor:
        """Add the gradients of a step to the parameters'; its mean weighted loss (a scalar).

        However many looks pass at once, each has the same draws, and in a step of few looks the same weight as in
        one of many: the gradients are those of the sum over its looks, divided by their usual number.
        """
        set_seed(seed_for(self.passes.objectives.seed, step, "dropout"), self.accelerator.device)
        self.flat.lower()
        num_looks = sum(map(len, batches))
        total, slot = torch.zeros((), device=self.accelerator.device), 0
        for batch in batches:
            looks = samples_of(step, batch, slot)
            slot += len(batch)
            at_once = self.micro_batch or len(looks)
            for start in range(0, len(looks), at_once):
                total += self.passes(looks[start : start + at_once], self.looks_per_step or num_looks) / num_looks
        return total

    def trial(self, batch: Sequence[int], step: int = 0) -> None:
        """One pass of a batch, with the draws of a step, that leaves nothing behind, with as much memory taken as an
        optimiser's two moments."""
        room = [torch.empty_like(one) for one in 2 * self.flat.groups] if not self.optimizer.state else []
        try:
            self.gradients(step, [batch])
        finally:
            del room
            self.flat.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The live parameters and their moving average, by name, as a state keeps them."""
        if not self.average:
            return dict(self.named)
        averages = {AVERAGE + name: self.flat.of(self.average, parameter) for name, parameter in self.named.items()}
        return {**self.named, **averages}

    def optimizer_state(self) -> dict[str, Any]:
        """Of the optimiser and, in fp16, of the loss scaler."""
        scaler = self.accelerator.scaler
        return {"optimizer": self.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor], optimizer: Mapping[str, Any]) -> None:
        """Back to what `tensors` and `optimizer_state` told; peak rates and weight decay stay as they are now."""
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
        """Within the block the parameters are those to look at and to keep: their moving average where one is kept.

        A schedule-free optimiser trains at another point than the one that it finds; its `eval` goes there, `train`
        back. Both points are put back bit for bit.
        """
        own: Any = self.optimizer.optimizer
        switches = hasattr(own, "eval")
        groups = self.flat.groups
        live = [values.detach().clone() for values in groups] if self.average or switches else []
        if switches:
            own.eval()
        for values, mean in zip(groups, self.average, strict=False):
            values.data.copy_(mean)
        self.flat.lower()
        try:
            yield
        finally:
            if switches:
                own.train()
            for values, value in zip(groups, live, strict=False):
                values.data.copy_(value)

    def _apply(self, total: torch.Tensor) -> torch.Tensor:
        """Apply the gradients where their loss and norm are finite; both, which are waited for, (2,)."""
        loss, norm = float(total), 0.0
        if math.isfinite(loss):
            norm = self._clipped()
        if not self._broken(loss, norm):
            self.optimizer.step()
            for mean, values in zip(self.average, self.flat.groups, strict=False):
                mean.lerp_(values.detach(), 1 - self.ema)
        return torch.tensor([loss, norm])

    def _apply_unseen(self, total: torch.Tensor) -> torch.Tensor:
        """The same, but the device looks: nothing is waited for. The optimiser is told as `GradScaler` tells it."""
        norm = get_total_norm(self.flat.gradients)
        if self.clip:
            clip_grads_with_norm_(self.flat.groups, self.clip, norm)
        numbers = torch.stack([total, norm])
        is_finite = numbers.isfinite().all().float()
        own: Any = self.optimizer.optimizer
        own.found_inf = 1 - is_finite
        try:
            self.optimizer.step()
        finally:
            del own.found_inf
        for mean, values in zip(self.average, self.flat.groups, strict=False):
            mean.lerp_(values.detach(), is_finite * (1 - self.ema))
        return numbers

    def _broken(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return "loss"
        return "gradient" if not math.isfinite(norm) and self.accelerator.scaler is None else ""  # fp16's leaves it out

    def _clipped(self) -> float:
        """The norm of all gradients, which are scaled down to the limit where it is above (Pascanu et al. 2013).

        As torch's `clip_grad_norm_`, but for its product with 1 where it is not. In fp16 they are unscaled before.
        """
        self.accelerator.unscale_gradients()
        norm = get_total_norm(self.flat.gradients)
        found = float(norm)
        if self.clip and found + CLIP_EPSILON > self.clip:
            clip_grads_with_norm_(self.flat.groups, self.clip, norm)
        return found

    def _fitting_gradients(self, step: int, batches: Sequence[Sequence[int]]) -> torch.Tensor:
        gave_room = False
        while (loss := unless_too_large(lambda: self.gradients(step, batches))) is None:
            self.flat.zero_grad()
            if not gave_room and self.passes.forget():  # passes of other shapes keep memory of their own
                gave_room = True
                free_unused()
            elif not self.need_less(max(map(len, batches))):
                raise TooLarge(
                    f"step {step + 1} does not fit into the memory of the {self.accelerator.device.type} device; "
                    "close other programs, or lower --resolution",
                    75,
                )
        return loss

    def need_less(self, largest: int) -> bool:
        """Take the next cheapest way to need less memory in a pass of `largest` looks; False where none is left."""
        self.passes.forget()
        at_once = min(self.micro_batch or largest, largest)
        if self.recompute:
            which = "more" if self.recomputed else "some" if len(self.recompute) > 1 else "all"
            self.recompute_next()
            self.say(f"out of memory: {which} activations are recomputed from here on (slower, the same result)")
        elif at_once > 1:
            self.micro_batch = -(-at_once // 2)
            self.say(
                f"out of memory: {counted(self.micro_batch, 'picture')} at once from here on, the effective batch stays"
            )
        elif self.quantize is not None and (bits := self.quantize()):
            self.say(f"out of memory: the base has {bits} bits from here on (slower, a little less exact)")
        else:
            return False
        return True

    def recompute_next(self) -> None:
        """Take the next step of gradient checkpointing."""
        self.recompute.pop(0)()
        self.recomputed += 1

    def _leave_out(self, step: int, broken: str) -> None:
        self.broken_in_a_row += 1
        line = f"step {step + 1}: the {broken} is not finite; the step is left out"
        if self.broken_in_a_row % HALVED_AFTER == 0 and not self.is_hopeless:
            self.rate_factor /= 2
            line += f", and after {self.broken_in_a_row} such in a row the rate is halved"
        self.say(line)
