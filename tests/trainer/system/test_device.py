"""Devices, launchers and memory, as far as they can be tested without an accelerator."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from diffusers.models import attention_processor
from PIL import Image
from runs import SAMPLES, train_run
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
    WORLD_SIZE_VARIABLES,
    best_device,
    check_attention,
    make_accelerator,
    memory_mb,
    reset_peak_memory,
    total_memory_mb,
)
from scumble.trainer.system.out_of_memory import timed, unless_too_large

CPU, MPS = torch.device("cpu"), torch.device("mps")


@pytest.mark.parametrize("name", WORLD_SIZE_VARIABLES)
def test_several_processes_are_refused_immediately(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(name, "2")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", str(SAMPLES), "--steps", "1", "--output-dir", str(tmp_path / "runs")])
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"scumble: {name}=2: a run uses one process on one device; start it without a launcher or with "
        "--num_processes 1"
    ]
    assert not list(tmp_path.iterdir())


def test_a_launcher_with_one_process_can_start_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    cli.main(["train", str(SAMPLES), "--dry-run", "--output-dir", str(tmp_path / "runs")])


class Xformers(ModuleType):
    """A stand-in for xformers that counts calls and uses the attention of torch."""

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
        """Takes tensors of shape (batch * heads, tokens, width)."""
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


def test_a_run_with_xformers_calls_it_and_trains_the_same(
    tmp_path: Path, xformers: Xformers, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(job, "check_attention", lambda attention, device: None)  # which requires CUDA
    plain, with_xformers = (
        train_run(
            tmp_path / kind,
            machine={"attention": kind},
            optimization={"learning_rate": 0.01},
            output={"preview_every": 0},
        )
        for kind in ("sdpa", "xformers")
    )
    assert plain.losses[0] != plain.losses[2]
    torch.testing.assert_close(with_xformers.losses, plain.losses, rtol=1e-5, atol=0)
    model = Model(base="sketch")
    layers = load(model, detect_base(model), CPU, torch.float32).unet.attn_processors
    passes, others = divmod(xformers.num_calls, len(layers))
    assert passes >= 3 and others == 1  # one call tests whether it works


def test_xformers_is_refused_if_it_is_missing_or_fails(xformers: Xformers, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(Refused, match="--attention xformers: supports only cuda devices, and this run uses mps"):
        check_attention("xformers", "mps")
    try_xformers(CPU, torch.float32)

    def fail(*args: object) -> torch.Tensor:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n     query")

    monkeypatch.setattr(xformers, "memory_efficient_attention", fail)
    wanted = r"xformers: fails on cpu in bfloat16 \(No operator found [^\n]* inputs:\); install the one built for torch"
    with pytest.raises(Refused, match=wanted) as error:
        try_xformers(CPU, torch.bfloat16)
    assert error.value.exit_code == 69
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="--attention xformers: not installed; pip install") as error:
        check_attention("xformers", "cuda")
    assert error.value.exit_code == 69


def test_resetting_the_peak_forgets_earlier_allocations():
    reset_peak_memory(CPU)
    before = memory_mb(CPU)
    torch.ones(2**26)  # 256 MB, freed immediately
    assert before + 200 < memory_mb(CPU) < total_memory_mb(CPU)
    reset_peak_memory(CPU)
    assert memory_mb(CPU) < before + 200


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A simulated MPS device with 3 of 5 GB allocated. Returns the list of calls to it."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: major < 14)
    for name, value in {
        "driver_allocated_memory": 3 * 2**30, "recommended_max_memory": 5 * 2**30, "synchronize": None,
        "empty_cache": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.mps, name, lambda name=name, value=value: calls.append(name) or value)
    return calls


def test_on_mps_timing_waits_for_the_device_and_memory_is_that_of_the_device(mps: list[str]):
    assert best_device() == "mps"
    timed(lambda: None, MPS)
    assert mps == ["synchronize"]
    assert (memory_mb(MPS), total_memory_mb(MPS)) == (3 * 1024, 5 * 1024)

    def too_large() -> None:
        raise RuntimeError("MPS backend out of memory (MPS allocated: 8.1 GB, max allowed: 9.0 GB).")

    unless_too_large(too_large)
    assert mps[-1] == "empty_cache"


def test_a_precision_that_mps_does_not_support_is_refused(mps: list[str], monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(Refused, match="--mixed-precision fp16: not supported on the mps device; use bf16 or fp32"):
        make_accelerator(Machine(mixed_precision="fp16"))
    with pytest.raises(Refused, match="--mixed-precision bf16: requires macOS 14 on the mps device; use fp32"):
        make_accelerator(Machine(mixed_precision="bf16"))
    with pytest.raises(Refused, match="--device cuda: torch finds no such device"):
        make_accelerator(Machine(device="cuda"))
    monkeypatch.setattr(PartialState, "default_device", property(lambda self: MPS))
    accelerator, dtype = make_accelerator(Machine())
    assert accelerator.device == MPS and dtype == torch.float32
    make_accelerator(Machine(device="cpu"))  # accelerate keeps its last device


class Float64Recorder(TorchDispatchMode):
    """Records operations that return float64 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
            self.operations.append(str(func))
        return result


def test_a_run_uses_no_float64_which_mps_does_not_support(tmp_path: Path):
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted(SAMPLES.glob("*.webp"))[:4]:
        (images / path.name).write_bytes(path.read_bytes())
        Image.new("L", Image.open(path).size, 128).save(images / f"{path.stem}-masklabel.png")
    objective = {"noise_offset": 0.1, "multires_noise_discount": 0.3, "input_perturbation": 0.1, "loss_type": "huber"}
    with Float64Recorder() as recorder:
        for number, weighting in enumerate(("min_snr", "debiased")):
            run = train_run(
                tmp_path / str(number), data={"images": str(images)},
                objective=objective | {"loss_weighting": weighting}, optimization={"steps": 2, "ema_decay": 0.9},
                network={"algorithm": ("dora", "lokr")[number]}, output={"preview_every": 2},
            )  # fmt: skip
            assert len(run.losses) == 2
        torch.zeros(2).double()
    assert recorder.operations == ["aten._to_copy.default"]
