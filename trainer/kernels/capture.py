"""Functions of named tensors, captured once for each shape of those and replayed: as CUDA graphs, on a CPU recorded.

At batch 1 a pass of a UNet is thousands of small kernels, and launching them one by one takes longer than they do. A
CUDA graph launches them all at once, computes the same, and needs no time to compile; a recording saves Python's share.
"""

import math
from collections.abc import Callable, Sequence

import torch

from ..system.device import is_out_of_memory
from .cpu_tape import Recordings
from .cuda_graphs import CudaGraphs, Replay

Tensors = dict[str, torch.Tensor]
Capture = Callable[[Replay], Replay]


class Captured:
    """`run` by way of `capture`, which turns a function into one that does the same on the same memory, faster.

    `kept` is what `run` adds to. Where it cannot be captured, or `capture` is None, it is run as it is; `say` gets the
    reason, once.
    """

    def __init__(
        self,
        run: Callable[[Tensors], torch.Tensor],
        capture: Capture | None,
        say: Callable[[str], None] = lambda line: None,
        kept: Sequence[torch.Tensor] = (),
    ):
        self.run, self.capture, self.say, self.kept = run, capture, say, kept
        self.by_shape: dict[tuple[object, ...], tuple[Tensors, Replay]] = {}

    def __call__(self, batch: Tensors) -> torch.Tensor:
        """Its result, which the next call may overwrite."""
        if self.capture is None:
            return self.run(batch)
        shape = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.items())
        if shape not in self.by_shape:
            try:
                self.by_shape[shape] = self._captured(batch, self.capture)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self.forget()
                result = self.run(batch)  # where it is not the capture that fails, this does, too
                self.disable()
                reason = str(error).splitlines()[0]
                self.say(f"CUDA graphs are off, each kernel is launched by itself: {reason}")
                return result
        static, replay = self.by_shape[shape]
        for name, tensor in batch.items():
            static[name].copy_(tensor, non_blocking=True)
        return replay()

    def forget(self) -> bool:
        """Drop what was captured, since the function is another from now on, or its memory is needed; False where
        there was nothing."""
        found = bool(self.by_shape)
        self.by_shape.clear()
        return found

    def disable(self) -> None:
        """Capture no more."""
        self.forget()
        self.capture = None

    def _captured(self, batch: Tensors, capture: Capture) -> tuple[Tensors, Replay]:
        static = {name: tensor.clone() for name, tensor in batch.items()}
        before = [one.clone() for one in self.kept]
        devices = {tensor.device for tensor in batch.values() if tensor.is_cuda}
        try:
            with torch.random.fork_rng(devices):  # warm-ups use up no chance
                return static, capture(lambda: self.run(static))
        finally:
            for one, value in zip(self.kept, before, strict=True):
                one.copy_(value)


def capture_for(
    device: torch.device,
    kept: Sequence[torch.Tensor] = (),
    factors: Sequence[torch.Tensor] = (),
    runs: float = math.inf,
) -> Capture | None:
    """What captures functions on a device, None where nothing does. They add to `kept`; `factors` are what is trained,
    of which they take their numbers; so many `runs` are expected in all."""
    if device.type == "cuda":
        return CudaGraphs()
    return Recordings(kept, factors, runs) if device.type == "cpu" else None
