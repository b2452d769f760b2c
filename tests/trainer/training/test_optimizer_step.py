"""A device that looks itself whether a step is finite, played by the CPU: to the bit as one that is waited for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from runs import Run, go_on, ran
from torch.utils._python_dispatch import TorchDispatchMode

from scumble.trainer.adapters.files import read_tensors
from scumble.trainer.run.state import newest_state
from scumble.trainer.system.device import AsyncValue
from scumble.trainer.training.flat_parameters import Flat
from scumble.trainer.training.forward_backward import Passes
from scumble.trainer.training.objective import Batch, Sample
from scumble.trainer.training.optimizer_step import HALVED_AFTER, STOPPED_AFTER, StepOutcome, Update
from scumble.trainer.training.optimizers import OPTIMIZERS, grouped, make_optimizer


class Cubes:
    """Losses |weights - x|³ summed; in some steps they are infinite, in some only the gradient is not a number."""

    seed = 0

    def __init__(self, weights: Sequence[torch.nn.Parameter], of_loss: Sequence[int], of_gradient: Sequence[int]):
        self.weights, self.of_loss, self.of_gradient = weights, of_loss, of_gradient

    def batch(self, looks: Sequence[Sample]) -> Batch:
        step = looks[0].step
        spoilt = torch.tensor(torch.inf if step in self.of_loss else 1.0)
        root = torch.tensor(0.0 if step in self.of_gradient else 1.0)  # of sqrt, whose gradient at 0 is infinite
        return {"x": torch.tensor([0.1 * (look.index + step) for look in looks]), "spoilt": spoilt, "root": root}

    def losses_of(self, batch: Batch) -> torch.Tensor:
        distances = sum((weight - batch["x"][:, None]).abs().pow(3).sum(1) for weight in self.weights)
        return distances * batch["spoilt"] + (batch["root"] * self.weights[0].square().sum()).sqrt()


def update_of(
    ahead: int, of_loss: Sequence[int] = (), of_gradient: Sequence[int] = (), clip: float = 1.0
) -> tuple[Update, list[str]]:
    weights = [torch.nn.Parameter(torch.linspace(0.1, 1.0, size)) for size in (5, 3)]
    groups = grouped([(0.01, weights[:1]), (0.02, weights[1:])])
    flat, said = Flat([group["params"] for group in groups]), []
    accelerator = Accelerator(cpu=True)
    passes = Passes(Cubes(weights, of_loss, of_gradient), flat, accelerator.backward)
    named = {str(number): weight for number, weight in enumerate(weights)}
    optimizer = make_optimizer("adamw", groups, 0.01, flat)
    update = Update(accelerator, passes, named, flat, optimizer, clip, 0.9, said.append)
    assert update.ahead == 0  # on a CPU nothing is gained
    update.ahead = ahead
    return update, said


def outcomes_of(update: Update, steps: int) -> list[StepOutcome]:
    found: list[StepOutcome] = []
    for step in range(steps):
        update.take(step, [[0, 1], [2]], 1.0 - step / 20)
        found += update.outcomes(of_all=False)
    return [*found, *update.outcomes()]


@pytest.mark.parametrize("clip", [0.0, 0.5, 1000.0])
def test_a_step_that_the_device_looks_at_itself_is_the_same_to_the_bit(clip: float):
    (one, said), (other, also_said) = (update_of(ahead, (3, 7, 8), (4, 10), clip) for ahead in (0, 1))
    first, second = outcomes_of(one, 12), outcomes_of(other, 12)
    assert [outcome.step for outcome in first] == list(range(12))
    assert {outcome.step: outcome.non_finite for outcome in first if outcome.non_finite} == {
        3: "loss", 4: "gradient", 7: "loss", 8: "loss", 10: "gradient",
    }  # fmt: skip
    assert repr(first) == repr(second) and said == also_said and len(said) == 5
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name
    states = [update.optimizer_state()["optimizer"]["state"] for update in (one, other)]
    for number in (0, 1):
        assert states[0][number]["step"] == 7 and states[0][number].keys() == states[1][number].keys()
        for name, tensor in states[0][number].items():
            assert torch.equal(tensor, states[1][number][name]), name


def test_a_rate_is_halved_one_step_later_and_a_hopeless_run_ends_one_step_later():
    broken = range(2, 2 + HALVED_AFTER)
    rates = [[outcome.learning_rate for outcome in outcomes_of(update_of(ahead, broken)[0], 8)] for ahead in (0, 1)]
    usual = [0.01 * (1.0 - step / 20) for step in range(8)]
    for ahead in (0, 1):
        halved = 2 + HALVED_AFTER + ahead
        assert rates[ahead] == pytest.approx([*usual[:halved], *(rate / 2 for rate in usual[halved:])])
    update, _ = update_of(1, range(100))
    taken = 0
    while not update.is_hopeless:
        update.take(taken, [[0]], 1.0)
        taken += 1
        list(update.outcomes(of_all=False))
    assert taken == STOPPED_AFTER + 1


class Asked(TorchDispatchMode):
    """Counts how often a number was asked for, which on CUDA waits for all that is queued."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_that_the_device_looks_at_itself_asks_for_no_number():
    asked = []
    for ahead in (0, 1):
        update, _ = update_of(ahead)
        update.take(0, [[0, 1]], 1.0)  # sets up what the optimiser keeps
        with Asked() as mode:
            update.take(1, [[0, 1], [2]], 1.0)
        asked.append(mode.times)
    assert asked == [2, 0]


def test_torchs_adamw_looks_itself_and_other_optimisers_are_waited_for():
    looks = {}
    for name in OPTIMIZERS:
        optimizer = make_optimizer(name, grouped([(0.01, [torch.nn.Parameter(torch.ones(2, 2))])]), 0.0)
        looks[name] = getattr(optimizer, "_step_supports_amp_scaling", False)
    assert [name for name, itself in looks.items() if itself] == ["adamw"]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every device is one that looks itself; when steps were taken, and their numbers read."""
    lines: list[str] = []
    init, take, values, number = Update.__init__, Update.take, AsyncValue.values, {}

    def ahead(self: Update, *given: Any, **more: Any) -> None:
        init(self, *given, **more)
        self.ahead = 1

    def taken(self: Update, step: int, *given: Any) -> None:
        lines.append(f"take {step}")
        take(self, step, *given)
        number[self.taken[-1][2]] = step

    def read(self: AsyncValue) -> list[float]:
        lines.append(f"read {number[self]}")
        return values(self)

    monkeypatch.setattr(Update, "__init__", ahead)
    monkeypatch.setattr(Update, "take", taken)
    monkeypatch.setattr(AsyncValue, "values", read)
    return lines


def told(run: Run) -> list[tuple[Any, ...]]:
    """What a run said of its steps, and what it left between them."""
    keys = "step", "epoch", "loss", "learning_rate", "file", "prompt_index"
    return [
        (event["kind"], *(event.get(key) for key in keys))
        for event in run.events
        if event["kind"] in ("step", "saved", "preview", "validation")
    ]


TABLES: dict[str, Any] = {
    "optimization": {"steps": 7, "ema_decay": 0.9, "gradient_accumulation_steps": 2},
    "output": {"save_every": 4, "preview_every": 5},
    "previews": {"prompts": ("owl, clay style",), "num_inference_steps": 1},
}


def test_a_run_whose_device_is_a_step_ahead_is_the_same_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[str]
):
    ahead = ran(tmp_path / "ahead", **TABLES)
    assert log == [
        "take 0", "take 1", "read 0", "take 2", "read 1", "take 3", "read 2", "read 3",  # saved
        "take 4", "read 4",  # previews
        "take 5", "take 6", "read 5", "read 6",
    ]  # fmt: skip
    monkeypatch.undo()
    waited = ran(tmp_path / "waited", **TABLES)
    assert told(ahead) == told(waited)
    one, other = (read_tensors(run.folder / "clay.safetensors")[0] for run in (ahead, waited))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_stop_waits_for_the_step_that_is_ahead_and_the_run_goes_on_as_if_unbroken(tmp_path: Path, log: list[str]):
    whole = ran(tmp_path / "whole", **TABLES)
    log.clear()

    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 1:
            (tmp_path / "cut/runs/clay/requests/stop").touch()

    first = ran(tmp_path / "cut", readers=[stop], **TABLES)
    assert log == ["take 0", "take 1", "read 0", "take 2", "read 1", "read 2"]
    kept = newest_state(first.folder, pytest.fail)
    assert kept and kept.state.step == 3 and kept.state.losses == whole.losses[:3]
    second = go_on(first.folder)
    assert first.losses + second.losses == whole.losses
    one, other = (read_tensors(run.folder / "clay.safetensors")[0] for run in (second, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)
