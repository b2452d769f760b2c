"""A device that checks by itself whether a step is finite, simulated on the CPU: bit-identical to waiting for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from runs import Run, adapter_of, assert_same, resume_run, train_run
from torch.utils._python_dispatch import TorchDispatchMode

from scumble.trainer.run.state import newest_state
from scumble.trainer.system.device import AsyncValue
from scumble.trainer.training.flat_parameters import FlatParameters
from scumble.trainer.training.forward_backward import Passes
from scumble.trainer.training.objective import Batch, Sample
from scumble.trainer.training.optimizer_step import HALVED_AFTER, STOPPED_AFTER, OptimizerStep, StepOutcome
from scumble.trainer.training.optimizers import OPTIMIZERS, make_optimizer, param_groups


class Cubes:
    """Losses |weights - x|³, infinite in steps `bad_loss`; in steps `bad_gradient` only the gradient is not finite."""

    seed = 0

    def __init__(self, weights: Sequence[torch.nn.Parameter], bad_loss: Sequence[int], bad_gradient: Sequence[int]):
        self.weights, self.bad_loss, self.bad_gradient = weights, bad_loss, bad_gradient

    def batch(self, samples: Sequence[Sample]) -> Batch:
        step = samples[0].step
        factor = torch.tensor(torch.inf if step in self.bad_loss else 1.0)
        root = torch.tensor(0.0 if step in self.bad_gradient else 1.0)  # the gradient of sqrt at 0 is infinite
        return {"x": torch.tensor([0.1 * (one.index + step) for one in samples]), "factor": factor, "root": root}

    def losses_of(self, batch: Batch) -> torch.Tensor:
        distances = sum((weight - batch["x"][:, None]).abs().pow(3).sum(1) for weight in self.weights)
        return distances * batch["factor"] + (batch["root"] * self.weights[0].square().sum()).sqrt()


def make_step(
    max_queued: int, bad_loss: Sequence[int] = (), bad_gradient: Sequence[int] = (), max_grad_norm: float = 1.0
) -> tuple[OptimizerStep, list[str]]:
    weights = [torch.nn.Parameter(torch.linspace(0.1, 1.0, size)) for size in (5, 3)]
    groups = param_groups([(0.01, weights[:1]), (0.02, weights[1:])])
    flat, reported = FlatParameters([group["params"] for group in groups]), []
    accelerator = Accelerator(cpu=True)
    passes = Passes(Cubes(weights, bad_loss, bad_gradient), flat, accelerator.backward)
    named = {str(number): weight for number, weight in enumerate(weights)}
    optimizer = make_optimizer("adamw", groups, 0.01, flat)
    optimizer_step = OptimizerStep(
        accelerator, passes, named, flat, optimizer, max_grad_norm, 0.9, report=reported.append
    )
    assert optimizer_step.max_queued == 0  # on a CPU a queue gains nothing
    optimizer_step.max_queued = max_queued
    return optimizer_step, reported


def outcomes_of(optimizer_step: OptimizerStep, num_steps: int) -> list[StepOutcome]:
    found: list[StepOutcome] = []
    for step in range(num_steps):
        optimizer_step.take(step, [[0, 1], [2]], 1.0 - step / 20)
        found += optimizer_step.outcomes(wait=False)
    return [*found, *optimizer_step.outcomes()]


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5, 1000.0])
def test_a_step_that_the_device_checks_by_itself_is_bit_identical(max_grad_norm: float):
    (one, lines), (other, other_lines) = (make_step(queued, (3, 7, 8), (4, 10), max_grad_norm) for queued in (0, 1))
    first, second = outcomes_of(one, 12), outcomes_of(other, 12)
    assert [outcome.step for outcome in first] == list(range(12))
    assert {outcome.step: outcome.non_finite for outcome in first if outcome.non_finite} == {
        3: "loss", 4: "gradient", 7: "loss", 8: "loss", 10: "gradient",
    }  # fmt: skip
    assert repr(first) == repr(second) and lines == other_lines and len(lines) == 5
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name
    states = [each.optimizer_state()["optimizer"]["state"] for each in (one, other)]
    for number in (0, 1):
        assert states[0][number]["step"] == 7 and states[0][number].keys() == states[1][number].keys()
        for name, tensor in states[0][number].items():
            assert torch.equal(tensor, states[1][number][name]), name


def test_with_a_queue_the_learning_rate_is_halved_and_a_hopeless_run_ends_one_step_later():
    bad_steps = range(2, 2 + HALVED_AFTER)
    usual = [0.01 * (1.0 - step / 20) for step in range(8)]
    for max_queued in (0, 1):
        learning_rates = [outcome.learning_rate for outcome in outcomes_of(make_step(max_queued, bad_steps)[0], 8)]
        halved = 2 + HALVED_AFTER + max_queued
        assert learning_rates == pytest.approx([*usual[:halved], *(rate / 2 for rate in usual[halved:])])
    optimizer_step, _ = make_step(1, range(100))
    num_taken, is_hopeless = 0, False
    while not is_hopeless:
        optimizer_step.take(num_taken, [[0]], 1.0)
        num_taken += 1
        is_hopeless = any(outcome.is_hopeless for outcome in optimizer_step.outcomes(wait=False))
    assert num_taken == STOPPED_AFTER + 1


class CountReads(TorchDispatchMode):
    """Counts how often the value of a tensor is read, which on CUDA waits for all that is queued."""

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_that_the_device_checks_by_itself_reads_no_value():
    num_reads = []
    for max_queued in (0, 1):
        optimizer_step, _ = make_step(max_queued)
        optimizer_step.take(0, [[0, 1]], 1.0)  # creates the state of the optimizer
        with CountReads() as mode:
            optimizer_step.take(1, [[0, 1], [2]], 1.0)
        num_reads.append(mode.num_reads)
    assert num_reads == [2, 0]


def test_only_the_adamw_of_torch_checks_by_itself_whether_a_step_is_finite():
    checks_itself = []
    for name in OPTIMIZERS:
        optimizer = make_optimizer(name, param_groups([(0.01, [torch.nn.Parameter(torch.ones(2, 2))])]), 0.0)
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            checks_itself.append(name)
    assert checks_itself == ["adamw"]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every device check steps by itself, and log when steps are taken and their numbers are read."""
    lines: list[str] = []
    init, take, values, step_of = OptimizerStep.__init__, OptimizerStep.take, AsyncValue.values, {}

    def init_with_queue(self: OptimizerStep, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.max_queued = 1

    def logged_take(self: OptimizerStep, step: int, *args: Any) -> None:
        lines.append(f"take {step}")
        take(self, step, *args)
        step_of[self.queued[-1][2]] = step

    def logged_values(self: AsyncValue) -> list[float]:
        lines.append(f"read {step_of[self]}")
        return values(self)

    monkeypatch.setattr(OptimizerStep, "__init__", init_with_queue)
    monkeypatch.setattr(OptimizerStep, "take", logged_take)
    monkeypatch.setattr(AsyncValue, "values", logged_values)
    return lines


def summary_of(run: Run) -> list[tuple[Any, ...]]:
    """The events of the steps of a run, and of the files written between them."""
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


def test_a_run_whose_device_is_one_step_ahead_is_bit_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[str]
):
    queued = train_run(tmp_path / "queued", **TABLES)
    assert log == [
        "take 0", "take 1", "read 0", "take 2", "read 1", "take 3", "read 2", "read 3",  # checkpoint
        "take 4", "read 4",  # previews
        "take 5", "take 6", "read 5", "read 6",
    ]  # fmt: skip
    monkeypatch.undo()
    waited = train_run(tmp_path / "waited", **TABLES)
    assert summary_of(queued) == summary_of(waited)
    assert_same(adapter_of(queued.folder), adapter_of(waited.folder))


def test_a_stop_waits_for_the_queued_step_and_the_resumed_run_is_bit_identical(tmp_path: Path, log: list[str]):
    whole = train_run(tmp_path / "whole", **TABLES)
    log.clear()

    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 1:
            (tmp_path / "cut/runs/clay/requests/stop").touch()

    first = train_run(tmp_path / "cut", readers=[stop], **TABLES)
    assert log == ["take 0", "take 1", "read 0", "take 2", "read 1", "read 2"]
    loaded = newest_state(first.folder, pytest.fail)
    assert loaded and loaded.state.step == 3 and loaded.state.losses == whole.losses[:3]
    second = resume_run(first.folder)
    assert first.losses + second.losses == whole.losses
    assert_same(adapter_of(second.folder), adapter_of(whole.folder))
