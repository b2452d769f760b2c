"""Captured functions on the CPU, and CUDA graphs on stubs of torch.cuda that track streams, captures and pools."""

import gc
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_parts import recorded

from scumble.trainer.kernels import cuda_graphs
from scumble.trainer.kernels.capture import Captured, Replay, Tensors, capture_for
from scumble.trainer.kernels.cpu_tape import Recordings
from scumble.trainer.kernels.cuda_graphs import WARM_UPS, CudaGraphs, allocate_in, own_stream, warm_up

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")]
Pool = tuple[int, int]


class Counting:
    """A capture method that counts its calls, and raises `error` if that is not None."""

    def __init__(self, error: Exception | None = None):
        self.times, self.error = 0, error

    def __call__(self, run: Replay) -> Replay:
        self.times += 1
        replay = recorded(run)
        if self.error:
            raise self.error
        return replay


def doubled(batch: Tensors) -> torch.Tensor:
    return 2 * batch["x"]


def test_each_set_of_names_shapes_and_dtypes_is_captured_once():
    capture = Counting()
    captured = Captured(lambda batch: next(iter(batch.values())).sum(), capture)
    batches = [
        {"x": torch.ones(2)}, {"x": torch.ones(3)}, {"x": torch.ones(2).double()}, {"y": torch.ones(2)},
        {"x": torch.ones(2), "y": torch.ones(2)},
    ]  # fmt: skip
    for _ in range(2):
        for batch in batches:
            assert float(captured(batch)) == next(iter(batch.values())).numel()
    assert capture.times == len(batches)


def test_a_replay_reads_the_values_of_the_last_batch_and_does_not_change_earlier_batches():
    captured = Captured(doubled, recorded)
    batches = [{"x": torch.full((2,), float(number))} for number in range(3)]
    assert [float(captured(batch)[0]) for batch in batches] == [0.0, 2.0, 4.0]
    assert [float(batch["x"][0]) for batch in batches] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("error", [None, RuntimeError("cannot be captured"), *OUT_OF_MEMORY])
def test_a_capture_does_not_change_accumulated_tensors_and_random_state(error: Exception | None):
    total = torch.ones(2)

    def run(batch: Tensors) -> torch.Tensor:
        return total.add_(torch.rand(2)).sum()

    captured = Captured(run, Counting(error), accumulated=[total])
    state = torch.get_rng_state()
    if error in OUT_OF_MEMORY:
        with pytest.raises(RuntimeError):
            captured({"x": torch.ones(2)})
        assert torch.equal(total, torch.ones(2)) and torch.equal(torch.get_rng_state(), state)
        return
    captured({"x": torch.ones(2)})
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    assert torch.equal(total, torch.ones(2) + torch.rand(2)) and torch.equal(torch.get_rng_state(), after)


def test_a_function_that_cannot_be_captured_runs_uncaptured_for_every_shape():
    reports: list[str] = []
    capture = Counting()
    captured = Captured(doubled, capture, reports.append)
    captured({"x": torch.ones(2)})
    capture.error = RuntimeError("not permitted\nsecond line")
    for size in (3, 2, 3):
        assert torch.equal(captured({"x": torch.ones(size)}), torch.full((size,), 2.0))
    assert capture.times == 2 and captured.by_shape == {}
    assert len(reports) == 1 and reports[0].endswith(": not permitted")


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_capture_that_runs_out_of_memory_raises_and_is_tried_again(error: Exception):
    capture = Counting(error)
    captured = Captured(doubled, capture, pytest.fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            captured({"x": torch.ones(2)})
    capture.error = None
    assert float(captured({"x": torch.ones(2)})[0]) == 2.0 and capture.times == 3


def test_forget_returns_whether_there_were_captures_and_the_next_call_captures_again():
    capture = Counting()
    captured = Captured(doubled, capture)
    assert not captured.forget()
    captured({"x": torch.ones(2)})
    assert captured.forget() and not captured.forget()
    captured({"x": torch.ones(2)})
    assert capture.times == 2


def test_disable_releases_captures_and_stops_capturing():
    capture = Counting()
    captured = Captured(doubled, capture, pytest.fail)
    captured({"x": torch.ones(2)})
    captured.disable()
    assert not captured.forget()
    assert float(captured({"x": torch.full((2,), 3.0)})[0]) == 6.0 and capture.times == 1


def test_cuda_captures_graphs_and_a_cpu_records_tapes_and_other_devices_capture_nothing():
    assert isinstance(capture_for(CUDA), CudaGraphs)
    assert isinstance(capture_for(CPU), Recordings)
    assert capture_for(torch.device("mps")) is None


class Stream:
    def __init__(self, gpu: "Gpu", name: str):
        self.gpu, self.name = gpu, name

    def wait_stream(self, other: "Stream") -> None:
        self.gpu.calls.append(f"{self.name} waits for {other.name}")


class Graph:
    """A stub of torch.cuda.CUDAGraph that takes its steps in the order of torch 2.11."""

    def __init__(self, gpu: "Gpu"):
        self.gpu, self.own_pool, self.is_invalid, self.is_complete = gpu, (0, 0), False, False

    def capture_begin(self, pool: Pool) -> None:
        assert self.gpu.current_stream().name != "default" and self.gpu.capturing is None
        self.gpu.begin(0, pool)
        self.own_pool, self.gpu.capturing = pool, self

    def capture_end(self) -> None:
        if self.gpu.capturing is not self:
            raise RuntimeError("the stream is not capturing")
        self.gpu.capturing = None
        if self.is_invalid:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.gpu.end(0, self.own_pool)
        self.is_complete = True

    def pool(self) -> Pool:
        assert self.is_complete
        return self.own_pool

    def replay(self) -> None:
        assert self.is_complete
        self.gpu.calls.append("replay")

    def __del__(self) -> None:
        if self.is_complete:
            self.gpu.release(0, self.own_pool)


class Gpu:
    """Stubs of what cuda_graphs.py calls in torch.cuda and its allocator. `uses` counts the holders of each pool."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.streams = [Stream(self, "default")]
        self.uses: dict[Pool, int] = {}
        self.allocating: list[Pool] = []
        self.capturing: Graph | None = None
        self.generator = SimpleNamespace(
            clone_state=dict, graphsafe_set_state=lambda state: self.calls.append("reseed")
        )

    def current_stream(self) -> Stream:
        return self.streams[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Generator[None]:
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    def begin(self, device: int, pool: Pool) -> None:
        assert self.uses.get(pool) != 0, "torch refuses a pool that has no holders any more"
        self.uses[pool] = self.uses.get(pool, 0) + 1
        self.allocating.append(pool)

    def end(self, device: int, pool: Pool) -> None:
        if pool not in self.allocating:
            raise RuntimeError("no stream allocates from this pool")
        self.allocating.remove(pool)

    def release(self, device: int, pool: Pool) -> None:
        assert self.uses[pool] > 0, "released more often than acquired"
        self.uses[pool] -= 1

    def invalidate(self) -> None:
        """Has the effect on a capture of a call that CUDA forbids."""
        assert self.capturing
        self.capturing.is_invalid = True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Generator[Gpu]:
    gpu, numbers = Gpu(), count(1)
    replaced: dict[str, Any] = {
        "CUDAGraph": lambda: Graph(gpu), "Stream": lambda: Stream(gpu, "side"), "stream": gpu.stream,
        "current_stream": gpu.current_stream, "current_device": lambda: 0, "default_generators": (gpu.generator,),
        "graph_pool_handle": lambda: (0, next(numbers)), "synchronize": lambda: gpu.calls.append("synchronize"),
        "empty_cache": lambda: gpu.calls.append("empty_cache"),
    }  # fmt: skip
    for name, stub in replaced.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    allocator = {
        "beginAllocateCurrentStreamToPool": gpu.begin,
        "endAllocateToPool": gpu.end,
        "releasePool": gpu.release,
    }
    for name, stub in allocator.items():
        monkeypatch.setattr(torch._C, f"_cuda_{name}", stub, raising=False)
    cuda_graphs.side_stream.cache_clear()
    yield gpu
    cuda_graphs.side_stream.cache_clear()


def assert_idle(gpu: Gpu) -> None:
    """No capture, no allocation from a pool, and the default stream is current and waits for the side stream."""
    assert gpu.capturing is None and gpu.allocating == [] and gpu.current_stream().name == "default"
    assert gpu.calls[-1] == "default waits for side"


def one() -> torch.Tensor:
    return torch.ones(1)


def test_a_function_is_warmed_up_and_captured_on_the_side_stream(gpu: Gpu):
    runs: list[tuple[str, bool]] = []

    def run() -> torch.Tensor:
        runs.append((gpu.current_stream().name, gpu.capturing is not None))
        return torch.full((1,), float(len(runs)))

    replay = CudaGraphs()(run)
    assert runs == [("side", False)] * WARM_UPS + [("side", True)]
    assert gpu.calls == ["side waits for default", "synchronize", "empty_cache", "default waits for side"]
    assert_idle(gpu)
    assert float(replay()) == float(replay()) == WARM_UPS + 1
    assert gpu.calls[-2:] == ["replay"] * 2 and len(runs) == WARM_UPS + 1


def test_later_graphs_share_the_pool_of_the_first_while_any_graph_exists(gpu: Gpu):
    capture = CudaGraphs()
    replays = [capture(one) for _ in range(3)]
    assert [*gpu.uses.values()] == [3]
    del replays[:2]
    replays.append(capture(one))
    assert [*gpu.uses.values()] == [2]
    replays.clear()
    assert [*gpu.uses.values()] == [0]


def test_a_pool_whose_graphs_are_all_deleted_is_not_reused(gpu: Gpu):
    capture = CudaGraphs()
    capture(one)
    replay = capture(one)
    assert [*gpu.uses.values()] == [0, len([replay])]


def test_each_cuda_graphs_object_has_its_own_pool(gpu: Gpu):
    replays = [CudaGraphs()(one) for _ in range(2)]
    assert [*gpu.uses.values()] == [1] * len(replays)


def raising(error: BaseException) -> None:
    raise error


def refused(gpu: Gpu) -> None:
    gpu.invalidate()
    raise RuntimeError("operation not permitted when stream is capturing")


FAILURES: dict[str, tuple[Callable[[Gpu], None], str]] = {
    "an error of the function": (lambda gpu: raising(ValueError("wrong value")), "wrong value"),
    "an interrupt": (lambda gpu: raising(KeyboardInterrupt("stop")), "stop"),
    "out of memory": (lambda gpu: raising(torch.OutOfMemoryError("CUDA out of memory")), "CUDA out of memory"),
    "a call that CUDA refuses": (refused, "not permitted when stream is capturing"),
    "an invalid capture": (Gpu.invalidate, "previous error during capture"),
}
INVALID = [failure for failure, (fail, _) in FAILURES.items() if fail in (refused, Gpu.invalidate)]


def fail_to_capture(gpu: Gpu, capture: CudaGraphs, failure: str) -> None:
    fail, message = FAILURES[failure]

    def run() -> torch.Tensor:
        if gpu.capturing:
            fail(gpu)
        return torch.ones(1)

    with pytest.raises(BaseException, match=message):
        capture(run)
    gc.collect()  # the frames of the error refer to the graph


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_capture_raises_its_own_error_and_the_next_capture_works(failure: str, gpu: Gpu):
    capture = CudaGraphs()
    fail_to_capture(gpu, capture, failure)
    assert_idle(gpu)
    assert gpu.calls.count("reseed") == (failure in INVALID)
    replay = capture(one)
    assert float(replay()) == 1.0 and gpu.allocating == []


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("is_shared", [False, True])
def test_a_failed_capture_releases_the_pool(failure: str, is_shared: bool, gpu: Gpu, request: pytest.FixtureRequest):
    capture = CudaGraphs()
    graphs = [capture(one)] if is_shared else []
    fail_to_capture(gpu, capture, failure)
    assert sum(gpu.uses.values()) == len(graphs)


def short_of_memory(gpu: Gpu, runs: list[bool], always: bool = False) -> Callable[[], torch.Tensor]:
    """A function with enough memory only in a pool, or never; `runs` records for each run whether cuDNN autotunes."""

    def run() -> torch.Tensor:
        if always or not gpu.allocating:
            raise torch.OutOfMemoryError("CUDA out of memory")
        runs.append(torch.backends.cudnn.benchmark)
        return torch.ones(1)

    return run


@pytest.fixture
def autotuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)


def test_a_warm_up_without_enough_memory_runs_in_the_pool_without_autotuning(gpu: Gpu, autotuning: None):
    runs: list[bool] = []
    capture = CudaGraphs()
    replay = capture(one)
    gpu.calls.clear()
    second = capture(short_of_memory(gpu, runs))
    assert runs == [False] * WARM_UPS + [True]
    assert torch.backends.cudnn.benchmark
    freed = ["empty_cache", "synchronize", "empty_cache"]
    assert gpu.calls == ["side waits for default", *freed, "default waits for side"]
    assert [*gpu.uses.values()] == [len([replay, second])]
    assert_idle(gpu)


def test_a_warm_up_without_enough_memory_and_without_a_pool_raises(gpu: Gpu, autotuning: None):
    with pytest.raises(torch.OutOfMemoryError):
        CudaGraphs()(short_of_memory(gpu, []))
    assert_idle(gpu)
    assert gpu.uses == {} and torch.backends.cudnn.benchmark


def test_a_warm_up_that_also_fails_in_the_pool_restores_autotuning_and_releases_the_pool(gpu: Gpu, autotuning: None):
    with pytest.raises(torch.OutOfMemoryError):
        warm_up(short_of_memory(gpu, [], always=True), (0, 7))
    assert torch.backends.cudnn.benchmark and gpu.allocating == [] and gpu.uses == {(0, 7): 0}


def test_allocation_in_a_pool_ends_and_releases_the_pool_whether_or_not_the_block_fails(gpu: Gpu):
    with allocate_in((0, 7)):
        assert gpu.allocating == [(0, 7)] and gpu.uses == {(0, 7): 1}
    assert gpu.allocating == [] and gpu.uses == {(0, 7): 0}
    with pytest.raises(ValueError), allocate_in((0, 8)):
        raise ValueError
    assert gpu.allocating == [] and gpu.uses[0, 8] == 0


@pytest.mark.parametrize("fails", [False, True])
def test_own_stream_is_the_side_stream_and_each_stream_waits_for_the_other(fails: bool, gpu: Gpu):
    try:
        with own_stream(CUDA):
            assert gpu.current_stream() is cuda_graphs.side_stream()
            assert gpu.calls == ["side waits for default"]
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert gpu.calls == ["side waits for default", "default waits for side"]
    assert gpu.current_stream().name == "default"


def test_own_stream_does_nothing_on_a_cpu(gpu: Gpu):
    with own_stream(CPU):
        assert gpu.calls == [] and gpu.current_stream().name == "default"
    assert gpu.calls == []
