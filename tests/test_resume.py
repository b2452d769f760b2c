"""A run that is cut goes on bit for bit; what changed since is named; two processes never train one run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import Run, ran

from scumble.configs import files
from scumble.trainer.adapters.files import read_tensors
from scumble.trainer.events import Event
from scumble.trainer.run_folder import request, status_of
from scumble.trainer.train import train

OPTIMISERS = ["adamw", "adamw8bit", "lion", "prodigy", "adafactor", "schedule_free"]


def go_on(run: Path, force: bool = False, stop_at: int = 0, **tables: dict[str, Any]) -> Run:
    """Go on with a run; `stop_at` asks it to stop after that step."""
    events: list[Event] = []

    def read(event: Event) -> None:
        events.append(event)
        if event["kind"] == "step" and event["step"] == stop_at:
            request(run, "stop")

    train(files.resolve(run / "options.toml", flags=tables), [read], go_on=run, force=force)
    return Run(run, events)


def begun(folder: Path, stop_at: int, **tables: dict[str, Any]) -> Path:
    """A run that was asked to stop after `stop_at` steps."""
    run = folder / "runs/clay"

    def read(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == stop_at:
            request(run, "stop")

    ran(folder, readers=[read], **tables)
    assert status_of(run).state == "stopped" and status_of(run).step == stop_at
    return run


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(run / "clay.safetensors")[0]


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_a_run_cut_twice_ends_with_the_very_adapter_of_an_unbroken_one(optimizer: str, tmp_path: Path):
    tables: dict[str, dict] = {
        "data": {"shuffle_tags": True, "caption_dropout": 0.3, "flip": True},
        "network": {"dropout": 0.2},
        "optimization": {"optimizer": optimizer, "steps": 8, "accumulate": 2, "ema": 0.5, "batch": 3},
        "output": {"preview_every": 3, "save_every": 4, "save_dtype": "fp32"},
    }
    if optimizer == "schedule_free":
        tables["optimization"]["ema"] = 0.0
    unbroken = ran(tmp_path / "a", **tables)
    cut = begun(tmp_path / "b", stop_at=3, **tables)
    go_on(cut, stop_at=5)
    last = go_on(cut)
    assert last.events[-1]["kind"] == "done" and [event["step"] for event in last.of("step")] == [6, 7, 8]
    assert last.losses == unbroken.losses[5:]
    assert_same(adapter_of(cut), adapter_of(unbroken.folder))
    assert (cut / "previews/grid.png").read_bytes() == (unbroken.folder / "previews/grid.png").read_bytes()
    assert json.loads((cut / "exit.json").read_text())["code"] == 0
