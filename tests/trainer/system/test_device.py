"""Devices, launchers and memory, as far as a machine without an accelerator can show them."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from diffusers.models import attention_processor
from PIL import Image
from runs import SAMPLES, ran
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scumble.configs.errors import Refused
from scumble.configs.options import Machine, Model
from scumble.trainer import cli
from scumble.trainer.base_model.detect import detect_base
from scumble.trainer.base_model.load import load
from scumble.trainer.kernels.attention import try_xformers
from scumble.trainer.plan import job
from scumble.trainer.system import device
from scumble.trainer.system.device import (
    SIZES_OF_LAUNCHES,
    best_device,
    check_attention,
    make_accelerator,
    memory_mb,
    reset_peak_memory,
    total_memory_mb,
)
from scumble.trainer.system.out_of_memory import timed, unless_too_large

CPU, MPS = torch.device("cpu"), torch.device("mps")


@pytest.mark.parametrize("name", SIZES_OF_LAUNCHES)
def test_a_run_of_several_processes_is_refused_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(name, "2")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", str(SAMPLES), "--steps", "1", "--output-dir", str(tmp_path / "runs")])
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"scumble: 2 processes ({name}): a run is one process on one device; start it without a launcher, or with "
        "--num_processes 1"
    ]
    assert not list(tmp_path.iterdir())


def test_a_launcher_of_one_process_may_start_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    cli.main(["train", str(SAMPLES), "--dry-run", "--output-dir", str(tmp_path / "runs")])


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
        ran(
            tmp_path / kind,
            machine={"attention": kind},
            optimization={"learning_rate": 0.01},
            output={"preview_every": 0},
        )
        for kind in ("sdpa", "xformers")
    )
    assert plain.losses[0] != plain.losses[2]
    torch.testing.assert_close(through.losses, plain.losses, rtol=1e-5, atol=0)
    model = Model(base="sketch")
    layers = load(model, detect_base(model), CPU, torch.float32).unet.attn_processors
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
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="--attention xformers: not installed; pip install") as error:
        check_attention("xformers", "cuda")
    assert error.value.exit_code == 69


def test_a_peak_is_of_what_came_after_the_last_one():
    reset_peak_memory(CPU)
    before = memory_mb(CPU)
    torch.ones(2**26)  # 256 MB, and gone
    assert before + 200 < memory_mb(CPU) < total_memory_mb(CPU)
    reset_peak_memory(CPU)
    assert memory_mb(CPU) < before + 200


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As if there were one, with 3 of 5 GB taken; what is called of it."""
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: major < 14)
    for name, value in {
        "driver_allocated_memory": 3 * 2**30, "recommended_max_memory": 5 * 2**30, "synchronize": None,
        "empty_cache": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.mps, name, lambda name=name, value=value: called.append(name) or value)
    return called


def test_on_mps_times_wait_for_the_device_and_memory_is_its_own(mps: list[str]):
    assert best_device() == "mps"
    timed(lambda: None, MPS)
    assert mps == ["synchronize"]
    assert (memory_mb(MPS), total_memory_mb(MPS)) == (3 * 1024, 5 * 1024)

    def too_large() -> None:
        raise RuntimeError("MPS backend out of memory (MPS allocated: 8.1 GB, max allowed: 9.0 GB).")

    unless_too_large(too_large)
    assert mps[-1] == "empty_cache"


def test_a_precision_that_mps_has_not_is_refused(mps: list[str], monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(Refused, match="--mixed-precision fp16: the mps device trains in bf16 or fp32"):
        make_accelerator(Machine(mixed_precision="fp16"))
    with pytest.raises(Refused, match="--mixed-precision bf16: the mps device has it since macOS 14; take fp32"):
        make_accelerator(Machine(mixed_precision="bf16"))
    with pytest.raises(Refused, match="--device cuda: this machine has none"):
        make_accelerator(Machine(device="cuda"))
    monkeypatch.setattr(PartialState, "default_device", property(lambda self: MPS))
    accelerator, dtype = make_accelerator(Machine())
    assert accelerator.device == MPS and dtype == torch.float32
    make_accelerator(Machine(device="cpu"))  # accelerate keeps what it was told last


class Wide(TorchDispatchMode):
    """Notes operations that give tensors of 64-bit floats."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
            self.found.append(str(func))
        return result


def test_a_run_needs_no_64_bit_floats_which_mps_has_not(tmp_path: Path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for path in sorted(SAMPLES.glob("*.webp"))[:4]:
        (pictures / path.name).write_bytes(path.read_bytes())
        Image.new("L", Image.open(path).size, 128).save(pictures / f"{path.stem}-masklabel.png")
    objective = {"noise_offset": 0.1, "multires_noise_discount": 0.3, "input_perturbation": 0.1, "loss_type": "huber"}
    with Wide() as wide:
        for number, weighting in enumerate(("min_snr", "debiased")):
            run = ran(
                tmp_path / str(number), data={"images": str(pictures)},
                objective=objective | {"loss_weighting": weighting}, optimization={"steps": 2, "ema_decay": 0.9},
                network={"algorithm": ("dora", "lokr")[number]}, output={"preview_every": 2},
            )  # fmt: skip
            assert len(run.losses) == 2
        torch.zeros(2).double()
    assert wide.found == ["aten._to_copy.default"]
