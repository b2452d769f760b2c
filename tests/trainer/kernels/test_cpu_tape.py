"""Tapes of passes on a CPU: bit-identical to the passes themselves, and not used where they cannot be."""

import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import train_run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from scumble.trainer.kernels import cpu_tape
from scumble.trainer.kernels.capture import Captured, Tensors
from scumble.trainer.kernels.cpu_tape import Pass, Recorder, Recordings
from scumble.trainer.training.optimizer_step import OptimizerStep

ARRAY = torch.zeros(3)  # shares memory with numpy, whose changes are not operators


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_tape, "PAYS_AFTER", 1)
    monkeypatch.setattr(cpu_tape, "PAYS_BELOW_S", 600.0)  # a busy machine is slower


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of operators of the tape in each replay, the one that verifies it included."""
    found: list[int] = []
    tape = Recorder.tape

    def counted(self: Recorder, result: torch.Tensor) -> Pass:
        replay = tape(self, result)

        def run() -> torch.Tensor:
            found.append(sum(node.op == "call_function" for node in self.graph.nodes))
            return replay()

        return run

    monkeypatch.setattr(Recorder, "tape", counted)
    return found


@pytest.fixture
def matches(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each run whether result, gradients and random state are bit-identical to those of the pass itself."""
    found: list[bool] = []
    call = cpu_tape._TapedPass.__call__

    def compared(self: cpu_tape._TapedPass) -> torch.Tensor:
        before = self._state()
        result = call(self)
        taped = [result, *self._state()]
        self._restore(before)
        found.append(all(map(torch.equal, taped, [self.run(), *self._state()])))
        return result

    monkeypatch.setattr(cpu_tape._TapedPass, "__call__", compared)
    return found


@pytest.mark.parametrize(
    "tables",
    [
        {"machine": {"mixed_precision": "fp32"}},
        {"machine": {"mixed_precision": "bf16"}},
        {"network": {"text_encoder_rank": 2, "conv_rank": 2, "lora_dropout": 0.2}},
        {"network": {"algorithm": "dora"}, "machine": {"gradient_checkpointing": True}},
        {"network": {"algorithm": "dora"}, "machine": {"mixed_precision": "bf16"}},
        {"machine": {"base_quantization": "int8", "mixed_precision": "bf16"}},
        {"machine": {"base_quantization": "nf4", "mixed_precision": "bf16"}, "objective": {"loss_type": "huber"}},
        {"optimization": {"steps": 2, "batch_size": 3, "gradient_accumulation_steps": 2}},
    ],
    ids=lambda tables: ",".join(str(value) for table in tables.values() for value in table.values()),
)
def test_every_pass_of_a_run_with_tapes_is_bit_identical_to_the_pass_without(
    tables: dict[str, Any], tmp_path: Path, replays: list[int], matches: list[bool]
):
    tables = {"optimization": {"steps": 2, "batch_size": 1}, "output": {"preview_every": 0}, **tables}
    train_run(tmp_path, **tables)
    assert len(replays) >= 4 and min(replays) > 500
    assert len(matches) >= 5 and all(matches)


@pytest.mark.parametrize(
    ("network", "precision", "num_replays"),
    [
        ({"algorithm": "loha"}, "fp32", 0),  # PEFT draws a Python number that decides whether a layer is dropped
        ({"algorithm": "lokr"}, "fp32", 0),
        ({"algorithm": "lokr"}, "bf16", 0),
        ({"lora_dropout": 0.2}, "fp32", 1),  # with checkpointing, so the tape does not match
    ],
    ids=lambda value: str(value),
)
def test_a_run_that_cannot_use_a_tape_trains_without_one(
    network: dict[str, Any], precision: str, num_replays: int, tmp_path: Path, replays: list[int], matches: list[bool]
):
    machine = {"mixed_precision": precision, "gradient_checkpointing": num_replays > 0}
    optimization = {"steps": 2, "batch_size": 1}
    train_run(tmp_path, network=network, machine=machine, optimization=optimization, output={"preview_every": 0})
    assert len(replays) == num_replays and all(matches)


def ran_both(
    function: Callable[[Tensors, torch.Tensor], torch.Tensor], times: int = 6, sizes: Sequence[int] = (3,)
) -> None:
    """Run `function` with new inputs each time, with and without a tape, and compare the result, the random state and
    the accumulated tensor bit for bit."""
    one, other = torch.zeros(3), torch.zeros(3)
    captured = Captured(lambda tensors: function(tensors, one), Recordings([one]), pytest.fail, [one])
    for number in range(times):
        tensors = {"x": torch.tensor([1.0, 2.0, -3.0, 4.0])[: sizes[number % len(sizes)]] * (number + 1)}
        torch.manual_seed(number)
        result, drawn = captured(tensors).clone(), torch.rand(1)
        torch.manual_seed(number)
        expected = function(tensors, other)
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(drawn, torch.rand(1)) and torch.equal(one, other)


def test_in_place_operators_views_parts_and_random_numbers_are_replayed(replays: list[int]):
    weight = torch.arange(9.0).view(3, 3)

    def function(tensors: Tensors, total: torch.Tensor) -> torch.Tensor:
        x = (tensors["x"] @ weight.t()).clone()
        x[1:].mul_(2).neg_()
        largest, place = x.view(3, 1).max(0)
        first, rest = x.split([1, 2])
        total.add_(torch.nn.functional.dropout(x, 0.5))
        torch.mul(tensors["x"][1:], 3, out=x[:2])
        return torch.cat([first, rest.flip(0)]).sum() + largest * place + weight[0, 2]

    ran_both(function)
    assert len(replays) == 6  # one to verify, and five of six runs
    weight.mul_(3)  # the same memory is read again
    ran_both(function)


def test_gradients_are_accumulated_in_their_buffers(replays: list[int]):
    parameter = torch.nn.Parameter(torch.tensor([0.5, 1.0, 2.0]))

    def function(tensors: Tensors, total: torch.Tensor) -> torch.Tensor:
        parameter.grad = total
        loss = (tensors["x"] * parameter).square().sum()
        loss.backward()
        return loss.detach()

    ran_both(function)
    assert len(replays) == 6


def test_an_operator_with_a_function_of_other_arguments_in_torch_is_replayed(replays: list[int]):
    """`torch.block_diag` takes tensors one by one, the operator takes a list."""
    ran_both(lambda tensors, total: torch.block_diag(tensors["x"], total.add_(1)) * 2)
    assert len(replays) == 6


def test_each_shape_has_its_own_tape(replays: list[int]):
    ran_both(lambda tensors, total: total.add_(tensors["x"].square().sum()) * 2, times=8, sizes=(3, 2))
    assert len(replays) == 4 + 3  # of four runs each; recorded in the first run and in the second run


def test_views_of_constants_are_made_only_while_recording():
    weight, x = torch.arange(6.0).view(2, 3), torch.ones(1, 3)
    with Recorder() as recorder:
        result = torch.mm(x, weight.t()[:, :1])
    replay = recorder.tape(result)
    assert sum(node.op == "call_function" for node in recorder.graph.nodes) == 1
    x.mul_(2)
    weight.mul_(2)
    assert torch.equal(replay(), torch.tensor([[12.0]]))


def test_recording_and_replay_free_each_tensor_after_its_last_use():
    class Alive(TorchDispatchMode):
        """Counts results that are alive at the same time."""

        def __init__(self) -> None:
            super().__init__()
            self.references: list[weakref.ref[torch.Tensor]] = []
            self.most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **kwargs or {})
            self.references.append(weakref.ref(result))
            self.most = max(self.most, sum(reference() is not None for reference in self.references))
            return result

    def run() -> torch.Tensor:
        x = start
        for _ in range(50):
            x = (x + 1).sin()
        return x

    start = torch.ones(3)
    with Alive() as recording, Recorder() as recorder:
        result = run()
    replay = recorder.tape(result)
    with Alive() as replaying:
        replay()
    assert recording.most <= 3 and replaying.most <= 3 and len(replaying.references) > 100


def test_a_tape_holds_no_constants_and_no_operators_that_nothing_uses():
    x, unused = torch.ones(3), torch.ones(3)
    with Recorder() as recorder:
        unused + 1
        result = x * 2
    replay, is_held = recorder.tape(result), weakref.ref(unused)
    del recorder, unused
    assert is_held() is None and torch.equal(replay(), torch.full((3,), 2.0))


def test_no_inference_tensors_leave_a_replay():
    total, weight = torch.zeros(3), torch.ones(3, requires_grad=True)

    def run() -> torch.Tensor:
        return total.add_(torch.ones(3)) * 2

    captured = Recordings([total])(run)
    for _ in range(4):
        result = captured()
    assert not result.is_inference() and not total.is_inference()
    (weight * result.add_(1)).sum().backward()  # autograd does not save inference tensors or change them in place
    assert weight.grad is not None and torch.equal(weight.grad, torch.full((3,), 9.0))


def branches(tensors: Tensors, total: torch.Tensor) -> torch.Tensor:
    total += torch.rand(3)
    return tensors["x"] * 2 if tensors["x"][0] > 3 else tensors["x"]


def by_numpy(tensors: Tensors, total: torch.Tensor) -> torch.Tensor:
    total += torch.rand(3)
    ARRAY.numpy()[:] = tensors["x"].numpy()
    return ARRAY * 2


def recomputed(tensors: Tensors, total: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    x = tensors["x"].clone().requires_grad_()
    checkpoint(lambda: torch.nn.functional.dropout(x.exp(), dropout).sin(), use_reentrant=False).sum().backward()
    assert x.grad is not None
    total += x.grad
    return x.detach() * 2


def dropped_again(tensors: Tensors, total: torch.Tensor) -> torch.Tensor:
    """Checkpointing restores the random state before it recomputes something, and that is not an operator."""
    return recomputed(tensors, total, 0.5)


def complex_numbers(tensors: Tensors, total: torch.Tensor) -> torch.Tensor:
    total += torch.rand(3)
    return torch.fft.fft(tensors["x"]).abs()


def lazily_negated(tensors: Tensors, total: torch.Tensor) -> torch.Tensor:
    total += torch.rand(3)
    return torch._neg_view(tensors["x"]) * 2


def own_generator(tensors: Tensors, total: torch.Tensor) -> torch.Tensor:
    total += torch.rand(3, generator=torch.default_generator)
    return tensors["x"] * 2


@pytest.mark.parametrize(
    ("function", "num_replays"),
    [(branches, 0), (complex_numbers, 0), (lazily_negated, 0), (own_generator, 0), (by_numpy, 1), (dropped_again, 1)],
)
def test_a_pass_that_cannot_be_replayed_is_run(function: Any, num_replays: int, replays: list[int]):
    ran_both(function, times=9)
    assert len(replays) == num_replays  # a tape that does not match is not tried again


def test_checkpointing_without_random_numbers_is_replayed(replays: list[int]):
    ran_both(recomputed)
    assert len(replays) == 6


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: torch.ones(3).sum().item(), "_local_scalar_dense.default returns a Python float"),
        (lambda: torch.ones(3).equal(torch.ones(3)), "aten.equal.default returns a Python bool"),
        (lambda: torch.rand(3, generator=torch.default_generator), "an operator takes a Generator"),
        (lambda: torch.ones(3) * torch.ones(3, dtype=torch.complex64), "takes a complex or negated tensor"),
    ],
)
def test_the_recorder_refuses_what_a_tape_cannot_repeat(run: Callable[[], object], message: str):
    with pytest.raises(RuntimeError, match=message), Recorder():
        run()


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tapes add twice as much as the pass."""
    tape = Recorder.tape

    def spoiled(self: Recorder, result: torch.Tensor) -> Pass:
        for node in self.graph.nodes:
            if node.target is torch.ops.aten.add_.Tensor:
                node.kwargs = {"alpha": 2}
        return tape(self, result)

    monkeypatch.setattr(Recorder, "tape", spoiled)


def test_a_tape_is_verified_with_factors_that_are_not_zero(replays: list[int], monkeypatch: pytest.MonkeyPatch):
    """Half of the factors of a new adapter are zero, which hides errors of what is multiplied by them."""
    spoil(monkeypatch)
    factor, total, expected = torch.zeros(3), torch.zeros(3), torch.zeros(3)

    def run(tensors: Tensors) -> torch.Tensor:
        total.add_(tensors["x"] * factor)
        return tensors["x"].sum()

    captured = Captured(run, Recordings([total], [factor]), pytest.fail, [total])
    for number in range(7):
        x = torch.arange(3.0) + number
        captured({"x": x})
        expected += x * factor
        assert torch.equal(total, expected)
        factor.fill_(max(0, number - 3))
    assert len(replays) == 1


def test_verification_does_not_change_factors_and_random_state(replays: list[int]):
    factor, total = torch.arange(3.0), torch.ones(3)
    captured = Recordings([total], [factor])(lambda: total.add_(factor * torch.rand(3)).sum())
    captured()
    torch.manual_seed(1)
    expected, before = total + factor * torch.rand(3), total.clone()
    after = torch.get_rng_state()
    torch.manual_seed(1)
    captured()
    assert len(replays) == 2 and not torch.equal(total, before)
    assert torch.equal(total, expected) and torch.equal(factor, torch.arange(3.0))
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("fails", ["to be made", "to be replayed"])
def test_a_tape_that_fails_is_not_used(fails: str, monkeypatch: pytest.MonkeyPatch):
    failed: list[str] = []

    def fail() -> torch.Tensor:
        failed.append(fails)
        raise TypeError("no such argument")

    def function(tensors: Tensors, total: torch.Tensor) -> torch.Tensor:
        total += torch.rand(3)
        return tensors["x"] * 2

    monkeypatch.setattr(Recorder, "tape", lambda self, result: fail() if fails == "to be made" else fail)
    ran_both(function)
    assert len(failed) == 1


def test_non_finite_numbers_verify_nothing(replays: list[int]):
    def function(tensors: Tensors, total: torch.Tensor) -> torch.Tensor:
        total.add_(tensors["x"])
        return tensors["x"] / (tensors["x"] - 2)  # 2 / 0 in the second run, which verifies the tape

    ran_both(function)
    assert len(replays) == 6  # not verified in the second run, verified in the third, then used


def test_gradients_that_are_all_zero_verify_nothing(replays: list[int], monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch)

    def function(tensors: Tensors, total: torch.Tensor) -> torch.Tensor:
        total.add_(tensors["x"] * (tensors["x"][0] - 2))  # 0 in the second run, which verifies the tape
        return tensors["x"].sum()

    ran_both(function)
    assert len(replays) == 2  # not verified in the second run, does not match in the third


def test_a_tape_that_is_never_verified_is_given_up(replays: list[int]):
    ran_both(lambda tensors, total: tensors["x"] * math.nan, times=30)
    assert len(replays) == cpu_tape.MAX_ATTEMPTS


def recorded_after(times: int, recordings: Recordings, replays: list[int]) -> int | None:
    """The number of runs, out of `times`, before a pass was recorded; None if it was not recorded."""
    replays.clear()
    function = recordings(lambda: torch.ones(3) * 2)
    for _ in range(times):
        assert torch.equal(function(), torch.full((3,), 2.0))
    return times - len(replays) if replays else None  # one run records, and the next one replays twice


def test_a_pass_that_runs_often_is_recorded_at_once(replays: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_tape, "PAYS_AFTER", 4)
    assert recorded_after(9, Recordings(runs=8), replays) == 0
    assert recorded_after(9, Recordings(runs=7), replays) == 4  # it would have paid
    assert recorded_after(4, Recordings(runs=7), replays) is None


def test_a_pass_that_runs_seldom_is_recorded_late(replays: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_tape, "PAYS_AFTER", 4)
    recordings = Recordings(runs=20)
    assert recorded_after(9, recordings, replays) == 0
    assert recorded_after(9, recordings, replays) == 4  # a share of 1/10, 2/11, 3/12: of 20 runs, less than 8


def test_a_slow_pass_is_not_recorded(replays: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_tape, "PAYS_BELOW_S", 0.0)
    ran_both(lambda tensors, total: total.add_(tensors["x"]).sum())
    assert not replays


def test_a_pass_that_is_slow_only_the_first_time_is_recorded_later(replays: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_tape, "PAYS_BELOW_S", 3.0)
    clock = iter([0.0, 9.0, *range(10, 30)])  # the first run takes 9 s, each other 1 s
    monkeypatch.setattr(cpu_tape.time, "perf_counter", lambda: next(clock))
    ran_both(lambda tensors, total: total.add_(tensors["x"]).sum())
    assert len(replays) == 4  # the second run is timed, the third is recorded


def test_too_little_memory_to_record_is_handled_and_too_little_to_run_is_raised():
    runs: list[int] = []

    def run() -> torch.Tensor:
        runs.append(1)
        if len(runs) in (1, 3, 4):
            raise torch.OutOfMemoryError("out of memory")
        return torch.ones(1)

    function = Recordings()(run)
    assert function() == 1 and len(runs) == 2  # once while recording, then directly
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            function()
    assert function() == 1


def test_too_little_memory_to_verify_changes_nothing():
    runs: list[int] = []
    total, factor = torch.ones(1), torch.ones(1)

    def run() -> torch.Tensor:
        runs.append(1)
        total.add_(factor)
        if len(runs) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return total * 2

    function = Recordings([total], [factor])(run)
    function()
    with pytest.raises(torch.OutOfMemoryError):
        function()
    assert total == 2 and factor == 1
    assert function() == 6 and total == 3


def test_a_trial_records_a_tape_and_a_trial_of_other_samples_verifies_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tried: list[tuple[int, list[int]]] = []
    trial = OptimizerStep.trial

    def recorded_trial(self: OptimizerStep, batch: Sequence[int], step: int) -> None:
        tried.append((step, [*batch]))
        trial(self, batch, step)

    monkeypatch.setattr(OptimizerStep, "trial", recorded_trial)
    train_run(tmp_path, optimization={"steps": 2, "batch_size": 2}, output={"preview_every": 0})
    recorded, verified, measured = tried
    assert recorded != verified == measured and {len(batch) for _, batch in tried} == {2}
    assert recorded[0] != verified[0] and recorded[1] != verified[1]


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_trials_start_again_if_one_does_not_fit_into_memory(
    fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    steps: list[int] = []
    trial = OptimizerStep.trial

    def recorded_trial(self: OptimizerStep, batch: Sequence[int], step: int) -> None:
        steps.append(step)
        if len(steps) == fails:
            raise torch.OutOfMemoryError("out of memory")
        trial(self, batch, step)

    monkeypatch.setattr(OptimizerStep, "trial", recorded_trial)
    train_run(tmp_path, optimization={"steps": 1, "batch_size": 1}, output={"preview_every": 0})
    assert steps == [*[0, 1, 1][:fails], 0, 1, 1]
