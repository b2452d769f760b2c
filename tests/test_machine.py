"""Devices, launchers and memory, as far as a machine without an accelerator can show them."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers.models import attention_processor
from test_train import SAMPLES, ran

from scumble.configs.errors import Refused
from scumble.configs.options import Model
from scumble.trainer import cli, job, machine
from scumble.trainer.kernels import try_xformers
from scumble.trainer.machine import SIZES_OF_LAUNCHES, check_attention
from scumble.trainer.models import load, recognise

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", SIZES_OF_LAUNCHES)
def test_a_run_of_several_processes_is_refused_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(name, "2")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", str(SAMPLES), "--steps", "1", "--runs", str(tmp_path / "runs")])
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"scumble: 2 processes ({name}): a run is one process on one device; start it without a launcher, or with "
        "--num_processes 1"
    ]
    assert not list(tmp_path.iterdir())


def test_a_launcher_of_one_process_may_start_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    cli.main(["train", str(SAMPLES), "--dry-run", "--runs", str(tmp_path / "runs")])


class Xformers(ModuleType):
    """A module as xformers is, which counts its calls, and whose attention is torch's own."""

    def __init__(self) -> None:
        super().__init__("xformers")
        self.ops, self.num_calls = self, 0

    def memory_efficient_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_bias: torch.Tensor | None = None,
        op: object = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Of (batch · heads, tokens, width) each."""
        assert query.ndim == 3
        self.num_calls += 1
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_bias, scale=scale)


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> Xformers:
    module = Xformers()
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(attention_processor, "xformers", module)
    return module


def test_a_run_with_xformers_attends_through_it_and_learns_the_same(
    tmp_path: Path, xformers: Xformers, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(job, "check_attention", lambda attention, device: None)  # which wants CUDA
    plain, through = (
        ran(tmp_path / kind, machine={"attention": kind}, optimization={"rate": 0.01}, output={"preview_every": 0})
        for kind in ("sdpa", "xformers")
    )
    assert plain.losses[0] != plain.losses[2]
    torch.testing.assert_close(through.losses, plain.losses, rtol=1e-5, atol=0)
    model = Model(base="sketch")
    layers = load(model, recognise(model), CPU, torch.float32).unet.attn_processors
    passes, others = divmod(xformers.num_calls, len(layers))
    assert passes >= 3 and others == 1  # which tries whether it computes


def test_xformers_is_refused_where_it_is_not_or_does_not_compute(xformers: Xformers, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(Refused, match="--attention xformers: computes on cuda devices only, and this run is on mps"):
        check_attention("xformers", "mps")
    try_xformers(CPU, torch.float32)

    def none(*args: object) -> torch.Tensor:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n     query")

    monkeypatch.setattr(xformers, "memory_efficient_attention", none)
    wanted = r"xformers: fails on cpu in bfloat16 \(No operator found [^\n]* inputs:\); install the one built for torch"
    with pytest.raises(Refused, match=wanted) as error:
        try_xformers(CPU, torch.bfloat16)
    assert error.value.exit_code == 69
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="--attention xformers: not installed; pip install") as error:
        check_attention("xformers", "cuda")
    assert error.value.exit_code == 69
