"""Modules are offloaded while a step does not need them, as on a CUDA device.

The tests simulate two devices on the CPU: offloaded modules are marked and fail to compute, as torch does across
devices.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import train_run
from tiny import tiny_base

from scumble.configs.options import Model
from scumble.trainer import train as recipe
from scumble.trainer.adapters.files import read_tensors
from scumble.trainer.base_model import offload
from scumble.trainer.base_model.detect import DetectedBase, detect_base
from scumble.trainer.base_model.load import Base, load_offloaded, place_unet
from scumble.trainer.base_model.offload import fetch, on_device
from scumble.trainer.training import objective
from scumble.trainer.training.objective import Batch, Objectives

OFFLOADED = torch.device("meta")  # only a marker


class Offloading:
    """Which modules are offloaded now, and which were in each pass."""

    def __init__(self) -> None:
        self.is_offloaded: dict[torch.nn.Module, bool] = {}
        self.in_passes: list[dict[str, bool]] = []

    def move(self, module: torch.nn.Module, device: torch.device) -> None:
        if module not in self.is_offloaded:
            for inner in module.modules():
                inner.register_forward_pre_hook(lambda *_: self.check(module))
        self.is_offloaded[module] = device == OFFLOADED

    def check(self, module: torch.nn.Module) -> None:
        if self.is_offloaded[module]:
            raise RuntimeError("Expected all tensors to be on the same device")


@pytest.fixture
def offloading(monkeypatch: pytest.MonkeyPatch) -> Offloading:
    offloading = Offloading()

    def loaded(model: Model, source: DetectedBase, device: torch.device, dtype: torch.dtype) -> Base:
        base = load_offloaded(model, source, device, dtype)
        for module in (base.unet, base.vae, *base.text_encoders):
            offloading.move(module, OFFLOADED)
        return base

    def placed(base: Base, model: Model, bits: int) -> torch.nn.Module:
        offloading.move(base.unet, base.device)
        return place_unet(base, model, bits)

    def watched(self: Objectives, batch: Batch) -> torch.Tensor:
        modules = {"unet": self.base.unet, "vae": self.base.vae, "text": self.base.text_encoders[0]}
        offloading.in_passes.append({name: offloading.is_offloaded[module] for name, module in modules.items()})
        return losses(self, batch)

    losses = Objectives.losses_of
    monkeypatch.setattr(offload, "move", offloading.move)
    monkeypatch.setattr(offload, "is_offloaded", lambda base, module: offloading.is_offloaded[module])
    for module in (offload, recipe):
        monkeypatch.setattr(module, "offload_device", lambda device: OFFLOADED)
    monkeypatch.setattr(recipe, "load_offloaded", loaded)
    monkeypatch.setattr(recipe, "place_unet", placed)
    monkeypatch.setattr(Objectives, "losses_of", watched)
    return offloading


def options(folder: Path, kind: str, **tables: Any) -> dict[str, Any]:
    base = str(tiny_base(kind, folder / "base"))
    frozen = {"text_encoder_rank": 0, "text_encoder_2_rank": 0}
    return {
        "model": {"base": base},
        "data": {"resolution": 64},
        "network": frozen,
        "output": {"preview_every": 2},
    } | tables


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_steps_run_with_only_the_unet_on_the_device_and_train_the_same_adapter(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
):
    tables = options(tmp_path, kind)
    plain = train_run(tmp_path / "plain", **tables)
    offloading: Offloading = request.getfixturevalue("offloading")
    run = train_run(tmp_path / "offloaded", **tables)
    assert run.losses == plain.losses
    ours, expected = (read_tensors(one.folder / "clay.safetensors")[0] for one in (run, plain))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)
    ours, expected = ((one.folder / "previews/step000003-01.png").read_bytes() for one in (run, plain))
    assert ours == expected
    assert len(offloading.in_passes) > 3
    assert all(offloaded == {"unet": False, "vae": True, "text": True} for offloaded in offloading.in_passes)


def test_a_trained_text_encoder_stays_on_the_device(tmp_path: Path, offloading: Offloading):
    train_run(tmp_path, **options(tmp_path, "sd1", network={"text_encoder_rank": 4}))
    assert all(offloaded == {"unet": False, "vae": True, "text": False} for offloaded in offloading.in_passes)


def test_text_encoders_stay_on_the_device_if_the_captions_exceed_the_encoding_cache(
    tmp_path: Path, offloading: Offloading, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(objective, "MAX_ENCODINGS", 2)
    train_run(tmp_path, **options(tmp_path, "sd1"))
    assert all(offloaded == {"unet": False, "vae": True, "text": False} for offloaded in offloading.in_passes)


def test_on_device_restores_the_placement_of_modules_even_after_an_error(tmp_path: Path, offloading: Offloading):
    tiny = Model(base=str(tiny_base("sd1", tmp_path / "base")))
    base = recipe.load_offloaded(tiny, detect_base(tiny), torch.device("cpu"), torch.float32)
    fetch(base, base.vae)
    with pytest.raises(ZeroDivisionError), on_device(base, base.vae, base.text_encoders[0]):
        assert not offloading.is_offloaded[base.vae] and not offloading.is_offloaded[base.text_encoders[0]]
        raise ZeroDivisionError
    assert not offloading.is_offloaded[base.vae] and offloading.is_offloaded[base.text_encoders[0]]
