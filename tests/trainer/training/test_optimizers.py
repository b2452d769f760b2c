"""Optimizers: each trains a LoRA from zero, keeps the learning rates of its groups, and is refused if not installed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import CHECKOUT

from scumble.configs.errors import Refused
from scumble.trainer.training.optimizers import (
    OPTIMIZERS,
    check_optimizer,
    make_optimizer,
    param_groups,
    set_learning_rate,
)

LEARNING_RATES = {"prodigy": 1.0}
SAMPLES = CHECKOUT / "datasets/samples/clay-style"


def fitted(name: str, steps: int = 150) -> tuple[float, float, torch.optim.Optimizer]:
    """Fit up @ down (rank 4, up = 0 as in LoRA) to a matrix. Returns the first and last loss, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(96, 4, generator=generator) @ torch.randn(4, 64, generator=generator) / 2
    down = torch.nn.Parameter(torch.randn(4, 64, generator=generator) / 8)
    up = torch.nn.Parameter(torch.zeros(96, 4))
    peak = LEARNING_RATES.get(name, 1e-2)
    optimizer = make_optimizer(name, param_groups([(peak, [down]), (peak, [up])]), 0.0)
    losses = []
    for step in range(steps):
        set_learning_rate(optimizer, min(1.0, (step + 1) / 10))
        loss = (up @ down - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1], optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_a_low_rank_matrix_from_zero(name: str):
    before, after, _ = fitted(name)
    assert after < 0.5 * before


def test_learning_rates_are_multiples_of_the_peak_of_each_group():
    groups = [(1e-3, [torch.nn.Parameter(torch.ones(2))]), (5e-4, [torch.nn.Parameter(torch.ones(2))])]
    optimizer = make_optimizer("adamw", param_groups(groups), 0.01)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 2.5e-4]
    assert optimizer.param_groups[0]["weight_decay"] == 0.01


def test_parameters_without_decay_have_the_learning_rate_of_their_group():
    decaying, constant = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = make_optimizer("adamw", param_groups([(1e-1, [decaying, constant])], [constant]), 0.5)
    (decaying.sum() * 0 + constant.sum() * 0).backward()
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-1, 1e-1]
    assert torch.equal(constant, torch.ones(2)) and bool((decaying < 1).all())


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("adamw8bit", "bitsandbytes"),
        ("lion", "lion_pytorch"),
        ("prodigy", "prodigyopt"),
        ("schedule_free", "schedulefree"),
    ],
)
def test_an_optimizer_that_is_not_installed_is_refused_with_the_install_command(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, package, None)  # makes Python raise ImportError
    with pytest.raises(Refused, match=rf'{name}: {package} is not installed; run pip install "scumble\[optimizers\]"'):
        check_optimizer(name, "cuda")


def test_an_optimizer_that_does_not_support_the_device_is_refused():
    check_optimizer("adamw8bit", "cuda")
    with pytest.raises(Refused, match="--optimizer adamw8bit: bitsandbytes does not support the mps device"):
        check_optimizer("adamw8bit", "mps")


def test_no_optimizer_prints_to_stdout(capsys: pytest.CaptureFixture[str]):
    for name in OPTIMIZERS:
        make_optimizer(name, param_groups([(0.01, [torch.nn.Parameter(torch.ones(2, 2))])]), weight_decay=0.01)
    assert capsys.readouterr().out == ""


IMPORTED = """
import sys
from scumble.trainer.cli import main
main(sys.argv[1:])
print("imported" if "bitsandbytes" in sys.modules else "not imported")
"""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], "not imported"), (["--optimizer", "adamw8bit"], "imported"), (["--base-quantization", "nf4"], "imported")],
    ids=["adamw", "adamw8bit", "nf4"],
)
def test_bitsandbytes_is_imported_only_if_it_is_used(flags: list[str], expected: str, tmp_path: Path):
    command = [
        "train", str(SAMPLES), "--base", "sketch", "--resolution", "64", "--steps", "1", "--batch-size", "1",
        "--preview-every", "0", "--device", "cpu", "--latent-cache", "off", "--output-dir", str(tmp_path), *flags,
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", IMPORTED, *command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == expected
