"""Modules wait while a step does not need them: a run in which none may compute while it waits, as on a CUDA device.

The CPU stands for both places here: what waits is marked, and refuses to compute as torch does across devices.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ran
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

ELSEWHERE = torch.device("meta")  # no more than a name of another place


class Places:
    """Which modules wait, and what waited in each pass."""

    def __init__(self) -> None:
        self.waiting: dict[torch.nn.Module, bool] = {}
        self.in_passes: list[dict[str, bool]] = []

    def send(self, module: torch.nn.Module, place: torch.device) -> None:
        if module not in self.waiting:
            for inner in module.modules():
                inner.register_forward_pre_hook(lambda *_: self.check(module))
        self.waiting[module] = place == ELSEWHERE

    def check(self, module: torch.nn.Module) -> None:
        if self.waiting[module]:
            raise RuntimeError("Expected all tensors to be on the same device")


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Places:
    places = Places()

    def loaded(model: Model, source: DetectedBase, device: torch.device, dtype: torch.dtype) -> Base:
        base = load_offloaded(model, source, device, dtype)
        for module in (base.unet, base.vae, *base.text_encoders):
            places.send(module, ELSEWHERE)
        return base

    def placed(base: Base, model: Model, bits: int) -> torch.nn.Module:
        places.send(base.unet, base.device)
        return place_unet(base, model, bits)

    def watched(self: Objectives, batch: Batch) -> torch.Tensor:
        modules = {"unet": self.base.unet, "vae": self.base.vae, "text": self.base.text_encoders[0]}
        places.in_passes.append({name: places.waiting[module] for name, module in modules.items()})
        return losses(self, batch)

    losses = Objectives.losses_of
    monkeypatch.setattr(offload, "send", places.send)
    monkeypatch.setattr(offload, "waits", lambda base, module: places.waiting[module])
    for module in (offload, recipe):
        monkeypatch.setattr(module, "resting_place", lambda device: ELSEWHERE)
    monkeypatch.setattr(recipe, "load_offloaded", loaded)
    monkeypatch.setattr(recipe, "place_unet", placed)
    monkeypatch.setattr(Objectives, "losses_of", watched)
    return places


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
def test_only_the_unet_is_there_in_a_step_and_the_adapter_is_the_same(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
):
    tables = options(tmp_path, kind)
    usual = ran(tmp_path / "usual", **tables)
    places: Places = request.getfixturevalue("places")
    run = ran(tmp_path / "parked", **tables)
    assert run.losses == usual.losses
    found, wanted = (read_tensors(one.folder / "clay.safetensors")[0] for one in (run, usual))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    found, wanted = ((one.folder / "previews/step000003-01.png").read_bytes() for one in (run, usual))
    assert found == wanted
    assert len(places.in_passes) > 3
    assert all(seen == {"unet": False, "vae": True, "text": True} for seen in places.in_passes)


def test_a_text_encoder_that_learns_stays(tmp_path: Path, places: Places):
    ran(tmp_path, **options(tmp_path, "sd1", network={"text_encoder_rank": 4}))
    assert all(seen == {"unet": False, "vae": True, "text": False} for seen in places.in_passes)


def test_text_encoders_stay_where_there_are_more_captions_than_are_kept(
    tmp_path: Path, places: Places, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(objective, "MAX_ENCODINGS", 2)
    ran(tmp_path, **options(tmp_path, "sd1"))
    assert all(seen == {"unet": False, "vae": True, "text": False} for seen in places.in_passes)


def test_what_was_at_hand_before_stays_and_what_waited_waits_again_even_after_an_error(tmp_path: Path, places: Places):
    tiny = Model(base=str(tiny_base("sd1", tmp_path / "base")))
    base = recipe.load_offloaded(tiny, detect_base(tiny), torch.device("cpu"), torch.float32)
    fetch(base, base.vae)
    with pytest.raises(ZeroDivisionError), on_device(base, base.vae, base.text_encoders[0]):
        assert not places.waiting[base.vae] and not places.waiting[base.text_encoders[0]]
        raise ZeroDivisionError
    assert not places.waiting[base.vae] and places.waiting[base.text_encoders[0]]
