"""Capture functions as CUDA graphs, which launch thousands of small kernels at once."""

from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any
from weakref import WeakSet

import torch

from ..system.device import free_unused

WARM_UPS = 2
Pool = Any  # as returned by torch.cuda.graph_pool_handle
Replay = Callable[[], torch.Tensor]


class CudaGraphs:
    """Captures functions on CUDA. The graphs share a memory pool, so only the last replay's result is valid."""

    def __init__(self) -> None:
        self.graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, run: Replay) -> Replay:
        """Warm up `run` on a side stream to initialize everything, then capture it once without running it.

        A pool whose graphs have all been deleted is not reused: torch refuses it while a tensor in it is alive.
        """
        stream, current, graph = side_stream(), torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        pool = next((one.pool() for one in self.graphs), None)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                warm_up(run, pool)
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                result = record(graph, pool or torch.cuda.graph_pool_handle(), run)
        finally:
            current.wait_stream(stream)
        self.graphs.add(graph)

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


@cache
def side_stream() -> torch.cuda.Stream:
    """The stream for all captures: cuBLAS keeps a workspace per stream that it has used, 32 MiB on an H100."""
    return torch.cuda.Stream()


def warm_up(run: Replay, pool: Pool | None) -> None:
    """Run the function a few times. If memory runs out, use the pool of existing graphs, which nothing else can use.

    In the pool, cuDNN autotuning is off: the memory that it tries out would stay in the pool.
    """
    try:
        for _ in range(WARM_UPS):
            run()
        return
    except torch.OutOfMemoryError:
        if pool is None:
            raise
    free_unused()
    autotune, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        with allocate_in(pool):
            for _ in range(WARM_UPS):
                run()
    finally:
        torch.backends.cudnn.benchmark = autotune


@contextmanager
def own_stream(device: torch.device) -> Generator[None]:
    """Within the block, a CUDA device runs everything on the stream of the captures.

    Then there is only one cuBLAS workspace, and every pass can use the memory that another one has freed.
    """
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
def allocate_in(pool: Pool) -> Generator[None]:
    """Within the block, the current stream allocates memory from a pool of graphs.

    As in torch's cudagraph_trees; `torch.cuda.use_mem_pool` does not affect the thread of backward passes.
    """
    device = torch.cuda.current_device()
    torch._C._cuda_beginAllocateCurrentStreamToPool(device, pool)
    try:
        yield
    finally:
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


def record(graph: torch.cuda.CUDAGraph, pool: Pool, run: Replay) -> torch.Tensor:
    """Capture `run` on the current stream and return its result.

    If the capture fails, the original error is raised; `torch.cuda.graph` would leave its stream active and raise
    another error.
    """
    graph.capture_begin(pool)
    try:
        result = run()
        graph.capture_end()
    except BaseException:
        try:
            graph.capture_end()
        except RuntimeError:  # CUDA aborted the capture; torch 2.11's allocator and generator still assume it runs
            device = torch.cuda.current_device()
            with suppress(RuntimeError):  # only a completely captured graph releases its hold on the pool
                torch._C._cuda_endAllocateToPool(device, pool)
                torch._C._cuda_releasePool(device, pool)
            generator = torch.cuda.default_generators[device]
            generator.graphsafe_set_state(generator.clone_state())
        raise
    return result
