"""All tests that need a CUDA device: `pytest -m gpu`. They are skipped if there is none."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import train_run
from tiny import tiny_base

from scumble.configs.errors import Refused
from scumble.configs.options import Model
from scumble.trainer import train as recipe
from scumble.trainer.adapters.files import read_tensors
from scumble.trainer.base_model.detect import detect_base
from scumble.trainer.base_model.load import Base, load, place_unet
from scumble.trainer.kernels import fused_norms
from scumble.trainer.kernels.cuda_graphs import CudaGraphs
from scumble.trainer.kernels.lora_matmul import _adds_to_fp32, _given
from scumble.trainer.preflight import try_out
from scumble.trainer.previews.prompts import PreviewPrompt
from scumble.trainer.previews.sampling import SAMPLERS, render
from scumble.trainer.training.flat_parameters import FlatParameters
from scumble.trainer.training.objective import Batch, Objectives
from scumble.trainer.training.optimizer_step import OptimizerStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def losses_on_cuda(folder: Path, precision: str, checkpointing: bool | str = "auto") -> list[float]:
    machine = {"device": "cuda", "mixed_precision": precision, "gradient_checkpointing": checkpointing}
    run = train_run(folder, machine=machine, optimization={"steps": 20}, output={"preview_every": 10})
    tensors, _ = read_tensors(run.folder / "clay.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if name.endswith("lora_up.weight"))
    return run.losses


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "auto"])
def test_every_precision_trains_like_the_cpu(precision: str, tmp_path: Path):
    cpu = train_run(tmp_path / "cpu", optimization={"steps": 20}, output={"preview_every": 0}).losses
    cuda = losses_on_cuda(tmp_path / "cuda", precision)
    assert sum(cuda) == pytest.approx(sum(cpu), rel=0.01 if precision == "fp32" else 0.05)


def test_gradient_checkpointing_does_not_change_the_losses(tmp_path: Path):
    plain = losses_on_cuda(tmp_path / "a", "fp32", checkpointing=False)
    checkpointed = losses_on_cuda(tmp_path / "b", "fp32", checkpointing=True)
    assert checkpointed == pytest.approx(plain, rel=1e-3)


def test_a_pass_that_does_not_fit_falls_back_or_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def with_little_memory(*args: Any) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 40 * 2**20) / total)
        try_out(*args)

    monkeypatch.setattr(recipe, "try_out", with_little_memory)
    tables: Any = {"machine": {"device": "cuda"}, "data": {"resolution": 1024}}
    try:
        with pytest.raises(Refused, match=r"does not fit into the memory of the cuda device: .* lower --batch-size"):
            train_run(tmp_path, optimization={"steps": 1, "batch_size": 16}, **tables)
        events = (tmp_path / "runs/clay/events.jsonl").read_text()
        assert "gradient checkpointing for some blocks" in events and "1 image per pass" in events
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_two_runs_on_one_device_have_the_same_losses(tmp_path: Path):
    first, second = (losses_on_cuda(tmp_path / name, "bf16") for name in ("a", "b"))
    assert first == pytest.approx(second, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_captured_passes_have_the_losses_of_eager_ones(
    precision: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    machine = {"device": "cuda", "mixed_precision": precision, "gradient_checkpointing": checkpointing}
    tables: Any = {"machine": machine, "optimization": {"steps": 20}, "output": {"preview_every": 10}}
    captured = train_run(tmp_path / "captured", **tables)
    assert not [event for event in captured.of("note") if "CUDA graphs are off" in event["text"]]
    monkeypatch.setattr(recipe, "capture_for", lambda *args: None)
    eager = train_run(tmp_path / "eager", **tables)
    assert captured.losses == pytest.approx(eager.losses, rel=1e-4 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_that_is_one_step_ahead_has_the_losses_of_one_that_is_waited_for(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    queued: list[int] = []
    take = OptimizerStep.take
    monkeypatch.setattr(OptimizerStep, "take", lambda self, *args: queued.append(self.max_queued) or take(self, *args))
    machine = {"device": "cuda", "mixed_precision": precision}
    tables: Any = {"machine": machine, "optimization": {"steps": 20, "ema_decay": 0.9}, "output": {"preview_every": 10}}
    first = train_run(tmp_path / "queued", **tables)
    assert queued == [1] * 20
    monkeypatch.setattr(OptimizerStep, "max_queued", property(lambda self: 0, lambda self, number: None), raising=False)
    waited = train_run(tmp_path / "waited", **tables)
    assert queued[20:] == [0] * 20
    assert [event["step"] for event in first.of("step")] == list(range(1, 21))
    assert first.losses == pytest.approx(waited.losses, rel=1e-4 if precision == "fp32" else 1e-2)


def test_a_step_that_is_not_finite_is_skipped_by_the_gpu(tmp_path: Path):
    wanted = {
        "steps": 60,
        "learning_rate": 100.0,
        "text_encoder_lr": 100.0,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0.0,
        "max_grad_norm": 0.0,
    }
    output = {"preview_every": 0, "save_every": 1}
    with pytest.raises(Refused, match=r"as of step \d+ is .*clay\.safetensors"):
        train_run(tmp_path, machine={"device": "cuda", "mixed_precision": "fp32"}, optimization=wanted, output=output)
    tensors, _ = read_tensors(tmp_path / "runs/clay/clay.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_nothing_waits_for_the_gpu_in_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    taken: list[int] = []
    take = OptimizerStep.take

    def take_without_sync(self: OptimizerStep, *args: Any) -> None:
        taken.append(args[0])
        torch.cuda.set_sync_debug_mode("error" if args[0] >= 10 else "default")  # all shapes are captured by then
        try:
            take(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(OptimizerStep, "take", take_without_sync)
    train_run(
        tmp_path, machine={"device": "cuda"}, optimization={"steps": 20}, output={"preview_every": 0, "save_every": 0}
    )
    assert taken == list(range(20))


def test_a_pass_that_cannot_be_captured_runs_eagerly_and_leaves_the_gpu_state_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    losses_of = Objectives.losses_of

    def losses_with_sync(self: Objectives, batch: Batch) -> torch.Tensor:
        losses = losses_of(self, batch)
        losses.sum().item()
        return losses

    monkeypatch.setattr(Objectives, "losses_of", losses_with_sync)
    before = torch.cuda.current_stream()
    run = train_run(
        tmp_path, machine={"device": "cuda"}, network={"lora_dropout": 0.1}, optimization={"steps": 4},
        output={"preview_every": 2},
    )  # fmt: skip
    assert "CUDA graphs are off" in "".join(one["text"] for one in run.of("note"))
    assert len(run.losses) == 4 and torch.cuda.current_stream() == before
    gc.collect()
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()  # does nothing if torch still assumes a capture is running
    assert torch.cuda.memory_reserved() == reserved


def test_a_second_shape_is_captured_in_the_memory_of_the_first():
    weight = torch.randn(256, 256, device="cuda")

    def run(rows: int) -> torch.Tensor:
        return (torch.ones(rows, 256, device="cuda") @ weight).sum()

    capture = CudaGraphs()
    replays, reserved = [], []
    for rows in (2**18, 2**17, 2**18 - 5):  # 256 MiB and more each
        replays.append(capture(lambda rows=rows: run(rows)))
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[2] - reserved[0] < 64 * 2**20
    for replay, rows in zip(replays, (2**18, 2**17, 2**18 - 5), strict=True):
        torch.testing.assert_close(replay(), run(rows), rtol=1e-3, atol=1.0)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_gradients_of_factors_are_accumulated_in_fp32(num_layers: int):
    if not _adds_to_fp32(torch.device("cuda"), torch.bfloat16):
        pytest.skip("needs torch 2.8")
    left, right = (torch.randn(num_layers, 64, 64, device="cuda").bfloat16() for _ in range(2))
    if num_layers == 1:
        left, right = left[0], right[0]
    parameters = [torch.nn.Parameter(torch.zeros(64, 64, device="cuda")) for _ in range(num_layers)]
    flat = FlatParameters([parameters])
    flat.gradients[0].fill_(1)
    assert not any(one is not None for one in _given(parameters, left, right, 0.5))
    expected = 1 + 0.5 * (left.double() @ right.double())
    torch.testing.assert_close(flat.gradients[0].double(), expected.flatten(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_triton_kernels_match_those_of_torch(dtype: torch.dtype):
    pytest.importorskip("triton")
    assert fused_norms.why_not(torch.device("cuda:0"), dtype) == ""


def test_fewer_bits_use_less_gpu_memory():
    layers = [torch.nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16) for _ in range(64)]
    unet: Any = torch.nn.ModuleDict({"block": torch.nn.ModuleDict({"attentions": torch.nn.ModuleList(layers)})})
    nothing: Any = None
    device = torch.device("cuda")
    base = Base(nothing, nothing, unet.requires_grad_(False), nothing, [], [], nothing, 0, device)
    gc.collect()
    torch.cuda.empty_cache()
    before, used = torch.cuda.memory_reserved(), []
    for bits in (16, 8):
        place_unet(base, Model(), bits)
        torch.cuda.empty_cache()
        used.append(torch.cuda.memory_reserved() - before)
    assert 128 * 2**20 <= used[0] < 140 * 2**20 and used[1] < 80 * 2**20


def test_compiled_blocks_have_the_losses_of_eager_ones(tmp_path: Path):
    plain = losses_on_cuda(tmp_path / "plain", "fp32")
    compiled = train_run(
        tmp_path / "compiled", machine={"device": "cuda", "mixed_precision": "fp32", "torch_compile": "on"},
        optimization={"steps": 20}, output={"preview_every": 10},
    )  # fmt: skip
    assert [event for event in compiled.of("note") if "compiled: a step takes" in event["text"]]
    assert compiled.losses == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_captured_previews_match_eager_ones(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = Model(base=str(tiny_base(kind, tmp_path)))
    base = load(model, detect_base(model), torch.device("cuda"), torch.float32)
    prompts = [PreviewPrompt(word, "", 64, side, 3, 5, 4.0) for word, side in (("cat", 64), ("dog", 64), ("cat", 96))]
    captures: list[object] = []
    capture = CudaGraphs.__call__
    monkeypatch.setattr(CudaGraphs, "__call__", lambda self, run: captures.append(run) or capture(self, run))
    for sampler in SAMPLERS:
        captures.clear()
        captured = render(base, prompts, sampler, pytest.fail)
        assert len(captures) == 2
        eager = render(base, prompts, sampler, capture=lambda run: run)
        for one, other in zip(captured, eager, strict=True):
            assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 2
