"""Functions of named tensors, captured once per set of shapes and replayed: as CUDA graphs, or as tapes on a CPU.

At batch 1 a pass of a UNet is thousands of small kernels, and launching them one by one takes longer than running them.
A CUDA graph launches all of them at once, computes the same, and needs no compilation. A tape saves Python's overhead.
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
    """Runs `run` through `capture`, which turns a function into a faster one that works on the same memory.

    `accumulated` are the tensors that `run` adds to. If `capture` is None or fails, `run` is called directly; `report`
    is called once with the reason.
    """

    def __init__(
        self,
        run: Callable[[Tensors], torch.Tensor],
        capture: Capture | None,
        report: Callable[[str], None] = lambda line: None,
        accumulated: Sequence[torch.Tensor] = (),
    ):
        self.run, self.capture, self.report, self.accumulated = run, capture, report, accumulated
        self.by_shape: dict[tuple[object, ...], tuple[Tensors, Replay]] = {}

    def __call__(self, batch: Tensors) -> torch.Tensor:
        """The result, which the next call may overwrite."""
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
                result = self.run(batch)  # raises if the function itself fails, rather than its capture
                self.disable()
                reason = str(error).splitlines()[0]
                self.report(f"CUDA graphs are off (kernels are launched one by one): {reason}")
                return result
        static, replay = self.by_shape[shape]
        for name, tensor in batch.items():
            static[name].copy_(tensor, non_blocking=True)
        return replay()

    def forget(self) -> bool:
        """Release all captures, because the function changes or memory is needed. Returns whether there were any."""
        found = bool(self.by_shape)
        self.by_shape.clear()
        return found

    def disable(self) -> None:
        """Release all captures and stop capturing."""
        self.forget()
        self.capture = None

    def _captured(self, batch: Tensors, capture: Capture) -> tuple[Tensors, Replay]:
        static = {name: tensor.clone() for name, tensor in batch.items()}
        before = [tensor.clone() for tensor in self.accumulated]
        devices = {tensor.device for tensor in batch.values() if tensor.is_cuda}
        try:
            with torch.random.fork_rng(devices):  # warm-ups must not advance the random state
                return static, capture(lambda: self.run(static))
        finally:
            for tensor, value in zip(self.accumulated, before, strict=True):
                tensor.copy_(value)


def capture_for(
    device: torch.device,
    accumulated: Sequence[torch.Tensor] = (),
    factors: Sequence[torch.Tensor] = (),
    runs: float = math.inf,
) -> Capture | None:
    """The capture method for a device, or None if it has none.

    The captured functions add to `accumulated` and read the trained `factors`. `runs` is the expected number of calls.
    """
    if device.type == "cuda":
        return CudaGraphs()
    return Recordings(accumulated, factors, runs) if device.type == "cpu" else None
