"""Functions captured as CUDA graphs, which launch thousands of small kernels at once."""

from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any
from weakref import WeakSet

import torch

from ..system.device import free_unused

WARM_UPS = 2
Pool = Any  # what torch.cuda.graph_pool_handle gives
Replay = Callable[[], torch.Tensor]


class CudaGraphs:
    """Captures on CUDA. Its graphs share one pool of memory: none but the last replayed one's result is read."""

    def __init__(self) -> None:
        self.graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, run: Replay) -> Replay:
        """Run it a few times apart, so that all is initialised, then record it once without running it.

        A pool whose graphs are all gone is not taken again: torch refuses that while something in it is alive.
        """
        stream, here, graph = side_stream(), torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        pool = next((one.pool() for one in self.graphs), None)
        stream.wait_stream(here)
        try:
            with torch.cuda.stream(stream):
                warm_up(run, pool)
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                result = captured(graph, pool or torch.cuda.graph_pool_handle(), run)
        finally:
            here.wait_stream(stream)
        self.graphs.add(graph)

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


@cache
def side_stream() -> torch.cuda.Stream:
    """Where all is captured: cuBLAS keeps a workspace for each stream that it has computed on, of 32 MiB on an H100."""
    return torch.cuda.Stream()


def warm_up(run: Replay, pool: Pool | None) -> None:
    """Run it a few times; in the memory of graphs that are there, which nothing else can use, where other is lacking.

    There cuDNN does not search for the fastest convolutions: the memory that it tries out would stay with the graphs.
    """
    try:
        for _ in range(WARM_UPS):
            run()
        return
    except torch.OutOfMemoryError:
        if pool is None:
            raise
    free_unused()
    searches, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        with memory_of(pool):
            for _ in range(WARM_UPS):
                run()
    finally:
        torch.backends.cudnn.benchmark = searches


@contextmanager
def own_stream(device: torch.device) -> Generator[None]:
    """Within the block a CUDA device computes all on the stream where passes are captured: one workspace of cuBLAS, and
    memory that one pass leaves free serves every other."""
    if device.type != "cuda":
        yield
        return
    outer, own = torch.cuda.current_stream(), side_stream()
    own.wait_stream(outer)
    try:
        with torch.cuda.stream(own):
            yield
    finally:
        outer.wait_stream(own)


@contextmanager
def memory_of(pool: Pool) -> Generator[None]:
    """Within the block what the current stream needs comes from a pool of graphs.

    As torch's own cudagraph_trees have it; `torch.cuda.use_mem_pool` knows nothing of the thread of backward passes.
    """
    device = torch.cuda.current_device()
    torch._C._cuda_beginAllocateCurrentStreamToPool(device, pool)
    try:
        yield
    finally:
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


def captured(graph: torch.cuda.CUDAGraph, pool: Pool, run: Replay) -> torch.Tensor:
    """What `run` gives while the current stream records it. `torch.cuda.graph` leaves its stream in place, and tells
    of another error, where that fails."""
    graph.capture_begin(pool)
    try:
        result = run()
        graph.capture_end()
    except BaseException:
        try:
            graph.capture_end()
        except RuntimeError:  # CUDA has given the capture up; memory and chance of torch 2.11 believe that it goes on
            device = torch.cuda.current_device()
            with suppress(RuntimeError):  # only a graph that was captured whole gives its share of the pool back
                torch._C._cuda_endAllocateToPool(device, pool)
                torch._C._cuda_releasePool(device, pool)
            generator = torch.cuda.default_generators[device]
            generator.graphsafe_set_state(generator.clone_state())
        raise
    return result
