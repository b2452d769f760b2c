"""The trial pass before a run: memory is saved, as by gradient checkpointing, only if the pass does not fit."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from small_parts import PARTS, loss_of
from tiny import tiny_base

from scumble.configs.errors import Refused
from scumble.configs.options import Model, Network
from scumble.trainer.base_model.detect import BASES, detect_base
from scumble.trainer.base_model.load import load
from scumble.trainer.system.formatting import duration
from scumble.trainer.system.out_of_memory import TRIALS, measure
from scumble.trainer.training.checkpointing import enable_gradient_checkpointing, shallow_blocks
from scumble.trainer.training.lora import attach, component_of

CPU = torch.device("cpu")


class Device:
    """A pass that fits after `fits_after` calls of `need_less`, of which `num_options` succeed."""

    def __init__(self, fits_after: int, num_options: int, error: Exception):
        self.passes, self.calls, self.error = 0, 0, error
        self.fits_after, self.num_options = fits_after, num_options

    def trial(self) -> None:
        self.passes += 1
        if self.calls < self.fits_after:
            raise self.error

    def need_less(self) -> bool:
        self.calls += 1
        return self.calls <= self.num_options


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.1 GB, other allocations: 1.2 GB, max allowed: 9.0 GB)."),
    RuntimeError("Invalid buffer size: 20.25 GiB"),  # from Metal
    RuntimeError("CUDA error: out of memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "python", "cpu", "mps", "metal", "libraries"])
@pytest.mark.parametrize("fits_after", [0, 1, 2])
def test_a_pass_is_retried_with_less_memory_until_it_fits(fits_after: int, error: Exception):
    device = Device(fits_after, num_options=2, error=error)
    measured = measure(device.trial, CPU, device.need_less, "lower --batch-size")
    assert device.calls == fits_after and device.passes == fits_after + TRIALS  # the first pass that fits warms up
    assert measured.seconds < 1 and measured.memory_mb > 0


def test_a_pass_that_never_fits_is_refused_with_a_fix():
    device = Device(3, num_options=2, error=OUT_OF_MEMORY[0])
    with pytest.raises(Refused, match="does not fit into the memory of the cpu device: lower --batch-size"):
        measure(device.trial, CPU, device.need_less, "lower --batch-size")


def test_a_later_pass_that_needs_more_memory_is_handled_too():
    """For example, because it is captured, or because new captions are encoded."""
    calls: list[str] = []

    def trial() -> None:
        calls.append("pass")
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def need_less() -> bool:
        calls.append("less")
        return True

    measure(trial, CPU, need_less, "lower --batch-size")
    assert calls == [*["pass"] * 2, "less", *["pass"] * TRIALS]


def test_other_errors_of_a_pass_are_raised():
    with pytest.raises(RuntimeError, match="shapes"):
        measure(Device(1, 1, RuntimeError("shapes differ")).trial, CPU, lambda: True, "lower --batch-size")


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_gradient_checkpointing_gives_the_same_gradients_with_less_memory(kind: str, tmp_path: Path):
    def gradients(recompute: Sequence[bool]) -> tuple[list[torch.Tensor], int]:
        model = Model(base=str(tiny_base(kind, tmp_path / "base")))
        base = load(model, detect_base(model), CPU, torch.float32)
        trained = attach(base, Network(), PARTS, seed=0)
        for part in PARTS:
            component_of(base, part.name).train()
        for only_shallow in recompute:
            enable_gradient_checkpointing(base, PARTS, only_shallow)
            assert base.text_encoders[0].is_gradient_checkpointing is not only_shallow
        saved = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = loss_of(base)
        loss.backward()
        return [p.grad.clone() for module in trained for p in module.tensors.values() if p.grad is not None], saved

    (plain, most), *others = [gradients(recompute) for recompute in ([], [True], [True, False], [False])]
    assert len(plain) > 0
    for again, _ in others:
        assert len(plain) == len(again)
        for one, two in zip(plain, again, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-8)
    some, fewer, fewest = (saved for _, saved in others)
    assert most > some > fewer == fewest


@pytest.mark.parametrize(("config", "shallow"), [("sd15", ["0", "1", "2", "3"]), ("sdxl", ["0", "1", "1", "2"])])
def test_shallow_blocks_have_fewer_channels_than_the_deepest_blocks(config: str, shallow: list[str]):
    settings = json.loads((BASES / config / "unet/config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{name: value for name, value in settings.items() if not name.startswith("_")})
    paths = {id(module): path for path, module in unet.named_modules()}
    assert [paths[id(block)].split(".")[1] for block in shallow_blocks(unet)] == shallow


def test_durations_are_human_readable():
    assert [duration(seconds) for seconds in (3.4, 59, 61, 3500, 4800)] == [
        "3 s",
        "59 s",
        "1 min",
        "58 min",
        "1 h 20 min",
    ]


def test_the_fastest_trial_counts(monkeypatch: pytest.MonkeyPatch):
    for times, num_trials in (([5.0, 0.2, 0.1], 3), ([5.0, 6.0], 2), ([12.0], 1)):
        remaining = list(times)
        monkeypatch.setattr(
            "scumble.trainer.system.out_of_memory.timed", lambda trial, device, remaining=remaining: remaining.pop(0)
        )
        measured = measure(lambda: None, CPU, lambda: False, "lower --batch-size")
        assert measured.seconds == min(times) and len(times) - len(remaining) == num_trials
