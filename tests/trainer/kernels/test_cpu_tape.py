"""Recordings of passes on a CPU against the passes themselves, which torch runs: the same to the bit."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Run, ran

from scumble.trainer import train as recipe
from scumble.trainer.adapters.files import read_tensors
from scumble.trainer.kernels import cpu_tape
from scumble.trainer.kernels.capture import Captured, Tensors
from scumble.trainer.kernels.cpu_tape import Recordings
from scumble.trainer.kernels.program import Program
from scumble.trainer.training.optimizer_step import Update

ARRAY = torch.zeros(3)  # numpy has it too, and tells torch nothing of what it does there


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_tape, "PAID_BACK", 1)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of operators of what was replayed, one for each time."""
    found: list[int] = []
    finished = cpu_tape.Recorder.finished

    def counted(self: cpu_tape.Recorder, result: torch.Tensor, grouped: bool) -> Callable[[], torch.Tensor]:
        replay = finished(self, result, grouped)

        def run() -> torch.Tensor:
            found.append(sum(node.op == "call_function" for node in self.program.graph.nodes))
            return replay()

        return run

    monkeypatch.setattr(cpu_tape.Recorder, "finished", counted)
    return found


def file_of(run: Run) -> dict[str, torch.Tensor]:
    return read_tensors(run.folder / "clay.safetensors")[0]


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"machine": {"precision": "bf16"}},
        {"network": {"text_rank": 2, "conv_rank": 2, "dropout": 0.2}},
        {"network": {"network": "dora"}, "machine": {"checkpointing": True}},
        {"machine": {"quantize": "int8", "precision": "bf16"}},
        {"machine": {"quantize": "nf4", "precision": "bf16"}, "objective": {"loss": "huber"}},
        {"optimization": {"steps": 12, "batch": 3, "accumulate": 2}},
        {"network": {"network": "loha"}},
    ],
    ids=lambda tables: ",".join(str(value) for table in tables.values() for value in table.values()) or "plain",
)
def test_a_run_with_recordings_is_the_run_without(
    tables: dict[str, Any], tmp_path: Path, replays: list[int], monkeypatch: pytest.MonkeyPatch
):
    tables = {"optimization": {"steps": 12, "batch": 2}, "output": {"preview_every": 0}, **tables}
    network = tables.get("network", {}).get("network", "lora")
    recorded = ran(tmp_path / "recorded", **tables)
    if network == "loha":  # PEFT asks a random number in each pass whether a layer is dropped
        assert not replays
    else:
        assert len(replays) >= 4 and min(replays) > 500
    replays.clear()
    monkeypatch.setattr(recipe, "capture_for", lambda *given: None)
    plain = ran(tmp_path / "plain", **tables)
    assert not replays and recorded.losses == plain.losses
    for name, tensor in file_of(plain).items():
        assert torch.equal(file_of(recorded)[name], tensor)


def ran_both(function: Callable[[Tensors, torch.Tensor], torch.Tensor], times: int = 6, equal: bool = True) -> None:
    """`function` of other inputs each time, recorded and not: results, what it adds to, and chance are the same."""
    one, other = torch.zeros(3), torch.zeros(3)
    captured = Captured(lambda tensors: function(tensors, one), Recordings([one]), pytest.fail, [one])
    for number in range(times):
        tensors = {"x": torch.tensor([1.0, 2.0, -3.0]) * (number + 1)}
        torch.manual_seed(number)
        result, drawn = captured(tensors).clone(), torch.rand(1)
        torch.manual_seed(number)
        right = function(tensors, other)
        assert torch.equal(result, right) == equal and torch.equal(drawn, torch.rand(1)) and torch.equal(one, other)


def test_operators_in_place_views_parts_and_chance_are_recorded(replays: list[int]):
    weight = torch.arange(9.0).view(3, 3)

    def function(tensors: Tensors, total: torch.Tensor) -> torch.Tensor:
        x = (tensors["x"] @ weight.t()).clone()
        x[1:].mul_(2).neg_()
        largest, place = x.view(3, 1).max(0)
        first, rest = x.split([1, 2])
        torch.sin(x)  # wanted by nobody
        total.add_(torch.nn.functional.dropout(x, 0.5))
        return torch.cat([first, rest.flip(0)]).sum() + largest * place + weight[0, 2]

    ran_both(function)
    assert len(replays) == 6  # to prove it, and five times for it
    weight.mul_(3)  # the same memory is read again
    ran_both(function)


def test_gradients_are_recorded(replays: list[int]):
    parameter = torch.nn.Parameter(torch.tensor([0.5, 1.0, 2.0]))

    def function(tensors: Tensors, total: torch.Tensor) -> torch.Tensor:
        parameter.grad = total
        loss = (tensors["x"] * parameter).square().sum()
        loss.backward()
        return loss.detach()

    ran_both(function)
    assert len(replays) == 6


def test_operators_that_torch_has_in_python_too_are_recorded(replays: list[int]):
    """`torch.block_diag` takes its tensors one by one, the operator in a list."""
    ran_both(lambda tensors, total: torch.block_diag(tensors["x"], total.add_(1)) * 2)
    assert len(replays) == 6


def told(tensors: Tensors, total: torch.Tensor) -> torch.Tensor:
    total += torch.rand(3)
    return tensors["x"] * 2 if tensors["x"][0] > 3 else tensors["x"]


def behind_the_back(tensors: Tensors, total: torch.Tensor) -> torch.Tensor:
    total += torch.rand(3)
    ARRAY.numpy()[:] = tensors["x"].numpy()
    return ARRAY * 2


@pytest.mark.parametrize("function", [told, behind_the_back])
def test_what_cannot_be_recorded_is_run(function: Any, replays: list[int]):
    ran_both(function, times=9)
    assert len(replays) == 2 * (function is behind_the_back)  # to find it out, with grouped products and without


@pytest.mark.parametrize("fault", ["wrong", "fails"])
def test_products_that_cannot_be_grouped_are_recorded_apart(
    fault: str, replays: list[int], monkeypatch: pytest.MonkeyPatch
):
    """As where a library rounds products of another shape otherwise."""

    def spoil(program: Program) -> None:
        if fault == "fails":
            raise ValueError("no such shape")
        program.calls[-1].kwargs = {"alpha": 2}

    monkeypatch.setattr(cpu_tape, "group", spoil)
    ran_both(lambda tensors, total: total.add_(tensors["x"]).sum() + tensors["x"][0], times=7)
    assert len(replays) == 6  # to prove it once, and what is right from then on


def test_a_recording_is_proved_on_factors_that_are_not_zero(replays: list[int], monkeypatch: pytest.MonkeyPatch):
    """As those of a new adapter are, half of them, where nothing is seen of what comes after them."""

    def spoil(program: Program) -> None:
        for node in program.calls:
            if node.target is torch.ops.aten.add_.Tensor:
                node.kwargs = {"alpha": 2}

    monkeypatch.setattr(cpu_tape, "group", spoil)
    factor, total, right = torch.zeros(3), torch.zeros(3), torch.zeros(3)

    def run(tensors: Tensors) -> torch.Tensor:
        total.add_(tensors["x"] * factor)
        return tensors["x"].sum()

    captured = Captured(run, Recordings([total], [factor]), pytest.fail, [total])
    for number in range(7):
        x = torch.arange(3.0) + number
        captured({"x": x})
        right += x * factor
        assert torch.equal(total, right)
        factor.fill_(max(0, number - 3))
    assert len(replays) == 6  # one that is found wrong, one that is found right, and four


def test_a_recording_that_fails_is_not_used(monkeypatch: pytest.MonkeyPatch):
    def failed() -> torch.Tensor:
        raise TypeError("no such argument")

    def function(tensors: Tensors, total: torch.Tensor) -> torch.Tensor:
        total += torch.rand(3)
        return tensors["x"] * 2

    monkeypatch.setattr(cpu_tape.Recorder, "finished", lambda self, result, grouped: failed)
    ran_both(function)
    monkeypatch.setattr(cpu_tape.Recorder, "finished", lambda self, result, grouped: failed())
    ran_both(function)


def test_what_is_not_a_number_proves_nothing(replays: list[int]):
    def function(tensors: Tensors, total: torch.Tensor) -> torch.Tensor:
        total.add_(tensors["x"])
        return tensors["x"] / (tensors["x"] - 2)  # in the second run, which is to prove it, 2 / 0

    ran_both(function)
    assert len(replays) == 6  # tried in the second, proved in the third, used from then on


def test_gradients_that_are_all_zero_prove_nothing(replays: list[int]):
    def function(tensors: Tensors, total: torch.Tensor) -> torch.Tensor:
        total.add_(tensors["x"] * (tensors["x"][0] - 2))  # in the second run, which is to prove it, 0
        return tensors["x"].sum()

    ran_both(function)
    assert len(replays) == 6


def recorded_after(times: int, recordings: Recordings, replays: list[int]) -> int | None:
    """How many runs of so many came before a function was recorded; None if it was not."""
    replays.clear()
    function = recordings(lambda: torch.ones(3) * 2)
    for _ in range(times):
        assert torch.equal(function(), torch.full((3,), 2.0))
    return times - len(replays) if replays else None  # one run records, but the next is replayed twice


def test_what_is_run_often_is_recorded_soon(replays: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_tape, "PAID_BACK", 4)
    assert recorded_after(9, Recordings(runs=8), replays) == 0
    assert recorded_after(9, Recordings(runs=7), replays) == 4  # it would have paid


def test_what_is_run_seldom_is_recorded_late(replays: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_tape, "PAID_BACK", 4)
    recordings = Recordings(runs=20)
    assert recorded_after(9, recordings, replays) == 0
    assert recorded_after(9, recordings, replays) == 4  # 1 of 10, 2 of 11, 3 of 12: by that of 20 not 8


def test_room_is_free_again_where_a_recording_is_not_used_any_more(monkeypatch: pytest.MonkeyPatch):
    def take(program: Program) -> None:
        assert program.room.takes(100)

    monkeypatch.setattr(cpu_tape, "group", take)
    recordings = Recordings()
    function, other = (recordings(lambda: torch.ones(3) * 2) for _ in range(2))
    before = recordings.room.bytes_left
    for _ in range(2):
        function()
    assert recordings.room.bytes_left == before - 100
    monkeypatch.setattr(torch, "equal", lambda *given: False)  # nothing is proved
    other(), other()
    assert recordings.room.bytes_left == before - 200
    other()
    assert recordings.room.bytes_left == before - 100
    del function
    assert recordings.room.bytes_left == before


def test_what_a_trial_recorded_is_proved_by_other_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tried: list[tuple[int, list[int]]] = []
    trial = Update.trial

    def noted(self: Update, batch: Sequence[int], step: int) -> None:
        tried.append((step, [*batch]))
        trial(self, batch, step)

    monkeypatch.setattr(Update, "trial", noted)
    ran(tmp_path, optimization={"steps": 2, "batch": 2}, output={"preview_every": 0})
    recorded, proved, measured = tried
    assert recorded != proved == measured and {len(batch) for _, batch in tried} == {2}
    assert recorded[0] != proved[0] and recorded[1] != proved[1]


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_trials_begin_anew_where_one_does_not_fit(fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps: list[int] = []
    trial = Update.trial

    def noted(self: Update, batch: Sequence[int], step: int) -> None:
        steps.append(step)
        if len(steps) == fails:
            raise torch.OutOfMemoryError("no room")
        trial(self, batch, step)

    monkeypatch.setattr(Update, "trial", noted)
    ran(tmp_path, optimization={"steps": 2, "batch": 2}, output={"preview_every": 0})
    assert steps == [*[0, 1, 1][:fails], 0, 1, 1]


def test_what_never_proves_anything_is_not_tried_for_ever(replays: list[int]):
    ran_both(lambda tensors, total: tensors["x"] * math.nan, times=30, equal=False)
    assert len(replays) == cpu_tape.PROOFS + 1


def test_too_little_memory_to_record_is_met_and_too_little_to_run_is_told():
    runs: list[int] = []

    def run() -> torch.Tensor:
        runs.append(1)
        if len(runs) in (1, 3, 4):
            raise torch.OutOfMemoryError("no room")
        return torch.ones(1)

    function = Recordings()(run)
    assert function() == 1 and len(runs) == 2  # to be recorded, and then as it is
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        function()
    assert function() == 1


def test_what_takes_long_is_not_recorded(replays: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_tape, "PAYS_BELOW_S", 0.0)
    ran_both(lambda tensors, total: tensors["x"] * 2)
    assert not replays


def test_what_is_laid_out_in_the_first_run_is_no_part_of_its_recording(
    tmp_path: Path, replays: list[int], monkeypatch: pytest.MonkeyPatch
):
    """Else frozen weights would be laid out anew in each."""
    tables: Any = {
        "machine": {"precision": "bf16"}, "optimization": {"steps": 3, "batch": 2}, "output": {"preview_every": 0},
    }  # fmt: skip
    ran(tmp_path / "first", **tables)
    of_first, own = set(replays), Recordings.pays_after
    replays.clear()
    monkeypatch.setattr(Recordings, "pays_after", lambda self, times: times > 0 and own(self, times))
    ran(tmp_path / "second", **tables)
    assert set(replays) == of_first
