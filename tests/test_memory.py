"""The pass that is measured before a run: activations are recomputed only where it does not fit otherwise."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_base

from scumble.configs.errors import Refused
from scumble.configs.options import Model, Network
from scumble.trainer.lora import Part, attach, component_of, recompute_activations
from scumble.trainer.memory import duration, measure
from scumble.trainer.models import Base, load, recognise
from scumble.trainer.text import encode

CPU = torch.device("cpu")
PARTS = [Part("unet", 4, 4.0), Part("text", 2, 2.0)]


class Device:
    """A pass that fits only after `recompute`, or never."""

    def __init__(self, fits_after: int):
        self.passes, self.recomputed, self.fits_after = 0, 0, fits_after

    def trial(self) -> None:
        self.passes += 1
        if self.recomputed < self.fits_after:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def recompute(self) -> None:
        self.recomputed += 1


@pytest.mark.parametrize(
    ("fits_after", "asked", "used"), [(0, "auto", False), (1, "auto", True), (0, True, True), (0, False, False)]
)
def test_activations_are_recomputed_when_asked_or_when_a_pass_does_not_fit(
    fits_after: int, asked: bool | str, used: bool
):
    device = Device(fits_after)
    measured = measure(device.trial, CPU, asked, device.recompute, "lower --batch")
    assert measured.checkpointing is used and device.recomputed == int(used)
    assert measured.seconds < 1 and measured.memory_mb > 0


@pytest.mark.parametrize(("fits_after", "asked"), [(2, "auto"), (1, False), (2, True)])
def test_a_pass_that_does_not_fit_is_refused_with_the_cure(fits_after: int, asked: bool | str):
    device = Device(fits_after)
    with pytest.raises(Refused, match="does not fit into the memory of the cpu device: lower --batch"):
        measure(device.trial, CPU, asked, device.recompute, "lower --batch")


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_recomputed_activations_give_the_same_gradients(kind: str, tmp_path: Path):
    def gradients(recomputed: bool) -> list[torch.Tensor]:
        model = Model(base=str(tiny_base(kind, tmp_path / str(recomputed))))
        base = load(model, recognise(model), CPU, torch.float32)
        trained = attach(base, Network(), PARTS, seed=0)
        for part in PARTS:
            component_of(base, part.name).train()
        if recomputed:
            recompute_activations(base, PARTS)
            assert base.unet.is_gradient_checkpointing and base.text_encoders[0].is_gradient_checkpointing
        loss_of(base).backward()
        return [p.grad.clone() for module in trained for p in module.tensors.values() if p.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again) > 0
    for one, two in zip(plain, again, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-8)


def loss_of(base: Base) -> torch.Tensor:
    torch.manual_seed(3)
    conditioning = encode(base, ["a cat", "a dog"])
    added = None
    if conditioning.pooled is not None:
        added = {"text_embeds": conditioning.pooled, "time_ids": torch.ones(2, 6)}
    noisy, timesteps = torch.randn(2, 4, 16, 16), torch.tensor([10, 900])
    return base.unet(noisy, timesteps, conditioning.hidden, added_cond_kwargs=added).sample.pow(2).mean()


def test_times_are_said_as_people_say_them():
    assert [duration(seconds) for seconds in (3.4, 59, 61, 3500, 4800)] == [
        "3 s",
        "59 s",
        "1 min",
        "58 min",
        "1 h 20 min",
    ]
