"""The pass that is measured before a run: activations are recomputed only where it does not fit otherwise."""

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
from scumble.trainer.training.checkpointing import recompute_activations, shallow_blocks
from scumble.trainer.training.lora import attach, component_of

CPU = torch.device("cpu")


class Device:
    """A pass that fits only when less was asked for `fits_after` times; `ways` are there to need less."""

    def __init__(self, fits_after: int, ways: int, error: Exception):
        self.passes, self.asked, self.fits_after, self.ways, self.error = 0, 0, fits_after, ways, error

    def trial(self) -> None:
        self.passes += 1
        if self.asked < self.fits_after:
            raise self.error

    def need_less(self) -> bool:
        self.asked += 1
        return self.asked <= self.ways


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.1 GB, other allocations: 1.2 GB, max allowed: 9.0 GB)."),
    RuntimeError("Invalid buffer size: 20.25 GiB"),  # of Metal
    RuntimeError("CUDA error: out of memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "python", "cpu", "mps", "metal", "libraries"])
@pytest.mark.parametrize("fits_after", [0, 1, 2])
def test_a_pass_is_tried_with_less_until_it_fits(fits_after: int, error: Exception):
    device = Device(fits_after, ways=2, error=error)
    measured = measure(device.trial, CPU, device.need_less, "lower --batch-size")
    assert device.asked == fits_after and device.passes == fits_after + TRIALS  # the first that fits warms up
    assert measured.seconds < 1 and measured.memory_mb > 0


def test_a_pass_that_never_fits_is_refused_with_the_cure():
    device = Device(3, ways=2, error=OUT_OF_MEMORY[0])
    with pytest.raises(Refused, match="does not fit into the memory of the cpu device: lower --batch-size"):
        measure(device.trial, CPU, device.need_less, "lower --batch-size")


def test_a_later_pass_that_needs_more_is_met_too():
    """As where it is recorded, or new captions are encoded."""
    done: list[str] = []

    def trial() -> None:
        done.append("pass")
        if len(done) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def need_less() -> bool:
        done.append("less")
        return True

    measure(trial, CPU, need_less, "lower --batch-size")
    assert done == [*["pass"] * 2, "less", *["pass"] * TRIALS]


def test_another_error_of_a_pass_is_no_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        measure(Device(1, 1, RuntimeError("shapes differ")).trial, CPU, lambda: True, "lower --batch-size")


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_recomputed_activations_give_the_same_gradients_and_the_more_the_fewer_are_kept(kind: str, tmp_path: Path):
    def gradients(recompute: Sequence[bool]) -> tuple[list[torch.Tensor], int]:
        model = Model(base=str(tiny_base(kind, tmp_path / "base")))
        base = load(model, detect_base(model), CPU, torch.float32)
        trained = attach(base, Network(), PARTS, seed=0)
        for part in PARTS:
            component_of(base, part.name).train()
        for only_shallow in recompute:
            recompute_activations(base, PARTS, only_shallow)
            assert base.text_encoders[0].is_gradient_checkpointing is not only_shallow
        kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = loss_of(base)
        loss.backward()
        return [p.grad.clone() for module in trained for p in module.tensors.values() if p.grad is not None], kept

    (plain, most), *others = [gradients(recompute) for recompute in ([], [True], [True, False], [False])]
    assert len(plain) > 0
    for again, _ in others:
        assert len(plain) == len(again)
        for one, two in zip(plain, again, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-8)
    some, fewer, fewest = (kept for _, kept in others)
    assert most > some > fewer == fewest


@pytest.mark.parametrize(("config", "shallow"), [("sd15", ["0", "1", "2", "3"]), ("sdxl", ["0", "1", "1", "2"])])
def test_shallow_blocks_are_those_of_fewer_channels(config: str, shallow: list[str]):
    settings = json.loads((BASES / config / "unet/config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{name: value for name, value in settings.items() if not name.startswith("_")})
    paths = {id(module): path for path, module in unet.named_modules()}
    assert [paths[id(block)].split(".")[1] for block in shallow_blocks(unet)] == shallow


def test_times_are_said_as_people_say_them():
    assert [duration(seconds) for seconds in (3.4, 59, 61, 3500, 4800)] == [
        "3 s",
        "59 s",
        "1 min",
        "58 min",
        "1 h 20 min",
    ]


def test_a_pass_that_another_program_delayed_is_not_what_the_run_expects(monkeypatch: pytest.MonkeyPatch):
    for times, passes in (([5.0, 0.2, 0.1], 3), ([5.0, 6.0], 2), ([12.0], 1)):
        left = list(times)
        monkeypatch.setattr("scumble.trainer.system.out_of_memory.timed", lambda trial, device, left=left: left.pop(0))
        measured = measure(lambda: None, CPU, lambda: False, "lower --batch-size")
        assert measured.seconds == min(times) and len(times) - len(left) == passes
