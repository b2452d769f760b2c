"""Learning-rate schedules against torch's and diffusers' own."""

import math

import pytest
import torch
from diffusers.optimization import get_scheduler

from scumble.trainer.training.lr_schedules import lr_multiplier, num_warmup_steps


@pytest.mark.parametrize(
    ("name", "share_or_steps", "expected"),
    [("cosine", 0.05, 5), ("cosine", 1, 1), ("cosine", 12, 12), ("constant", 0.5, 0), ("constant_with_warmup", 10, 10)],
)
def test_warmup_is_a_number_of_steps_or_below_one_a_share(name: str, share_or_steps: float, expected: int):
    assert num_warmup_steps(name, share_or_steps, 100) == expected


@pytest.mark.parametrize("name", ["constant", "cosine", "cosine_with_restarts", "linear"])
def test_without_warmup_the_curve_is_that_of_diffusers(name: str):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=40, num_cycles=2)
    for step in range(40):
        assert lr_multiplier(name, step, 40, 0.0, 2) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("name", ["constant_with_warmup", "cosine", "linear", "rex"])
def test_warmup_rises_linearly_is_never_zero_and_ends_at_the_peak(name: str):
    found = [lr_multiplier(name, step, 100, 9, 1) for step in range(100)]
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert all(0 < multiplier <= 1 for multiplier in found)


def test_warmup_longer_than_the_run_is_a_ramp():
    assert lr_multiplier("cosine", 4, 5, 9) == pytest.approx(0.5)


def test_rex_is_the_papers_formula():
    progress = 0.25
    expected = (1 - progress) / (0.5 + 0.5 * (1 - progress))
    assert lr_multiplier("rex", 25, 100, 0.0) == pytest.approx(expected) and math.isclose(expected, 6 / 7)
