"""Forward and backward passes, as they are or, on CUDA, captured once for each shape of batch and replayed.

At batch 1 a step of a UNet is thousands of small kernels, and launching them one by one takes longer than they do. A
CUDA graph launches them all at once, computes the same, and needs no time to compile.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from .flat import Flat
from .memory import is_out_of_memory
from .step import Batch, Look

WARM_UPS = 2
Replay = Callable[[], torch.Tensor]
Capture = Callable[[Replay], Replay]


class Differentiable(Protocol):
    """Losses of looks, in two steps: what a pass needs, and the pass, which never waits for the device."""

    seed: int

    def batch(self, looks: Sequence[Look]) -> Batch: ...
    def losses_of(self, batch: Batch) -> torch.Tensor: ...


class Passes:
    """Adds gradients to those of `flat`. `backward` is that of accelerate, `surroundings` its autocast where needed.

    `capture` turns a function without arguments into one that does the same on the same memory, faster; None for never.
    """

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
        self.capture, self.say = capture, say
        self.captured: dict[tuple[object, ...], tuple[Batch, Replay]] = {}
        self.prepared: dict[tuple[Look, ...], Batch] = {}

    def __call__(self, looks: Sequence[Look], divisor: float) -> torch.Tensor:
        """Add the gradient of the looks' summed loss / divisor; the sum, a scalar that the next call may overwrite."""
        batch = self.prepared.pop(tuple(looks), None) or self.objectives.batch(looks)
        batch["divisor"] = torch.full((), divisor, device=self.flat.groups[0].device)
        if self.capture is None:
            return self._run(batch)
        shape = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.items())
        if shape not in self.captured:
            try:
                self.captured[shape] = self._captured(batch, self.capture)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self.forget()
                self.capture = None
                self.say(f"CUDA graphs are off, each kernel is launched by itself: {str(error).splitlines()[0]}")
                return self._run(batch)
        static, replay = self.captured[shape]
        for name, tensor in batch.items():
            static[name].copy_(tensor, non_blocking=True)
        return replay()

    def prepare(self, looks: Sequence[Look]) -> None:
        """Make ready what the next pass needs, while the device is busy with this one."""
        self.prepared = {tuple(looks): self.objectives.batch(looks)}

    def forget(self) -> None:
        """Drop what was captured, since the pass is another from now on, or its memory is needed."""
        self.captured.clear()

    def _run(self, batch: Batch) -> torch.Tensor:
        with self.surroundings():
            loss = self.objectives.losses_of(batch).sum()
        self.backward(loss / batch["divisor"])
        return loss.detach()

    def _captured(self, batch: Batch, capture: Capture) -> tuple[Batch, Replay]:
        static = {name: tensor.clone() for name, tensor in batch.items()}
        before = [gradient.clone() for gradient in self.flat.gradients]
        device = self.flat.groups[0].device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # warm-ups use up no chance
                return static, capture(lambda: self._run(static))
        finally:
            for gradient, kept in zip(self.flat.gradients, before, strict=True):
                gradient.copy_(kept)


class CudaGraphs:
    """Captures on CUDA. All graphs share one pool of memory: none but the last replayed one's result is read."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Replay) -> Replay:
        """Run it a few times apart, so that all is initialised, then record it once without running it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay
