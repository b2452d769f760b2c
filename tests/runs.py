"""Runs for tests: train on the sample set, interrupt, resume and compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from paths import CHECKOUT

from scumble.configs import files
from scumble.trainer.adapters.files import read_tensors
from scumble.trainer.run.events import Event, Reader
from scumble.trainer.run.folder import request, status_of
from scumble.trainer.train import train

SAMPLES = CHECKOUT / "datasets/samples/clay-style"
CPU = torch.device("cpu")


@dataclass
class Run:
    folder: Path
    events: list[Event]

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["kind"] == kind]

    @property
    def losses(self) -> list[float]:
        return [event["loss"] for event in self.of("step")]


def train_run(folder: Path, dry_run: bool = False, readers: Sequence[Reader] = (), **tables: Any) -> Run:
    """Train on the clay-style samples, with few, cheap steps by default. `tables` override the options."""
    flags: dict[str, dict] = {
        "data": {"images": str(SAMPLES)},
        "optimization": {"steps": 3},
        "machine": {"device": "cpu", "mixed_precision": "fp32"},
        "previews": {"prompts": ("owl, clay style", "red apple, flat style"), "num_inference_steps": 2},
        "output": {"output_dir": str(folder / "runs"), "output_name": "clay"},
    }
    for table, keys in tables.items():
        flags[table] = flags.get(table, {}) | keys
    events: list[Event] = []
    result = train(files.resolve(flags=flags), [events.append, *readers], dry_run=dry_run)
    return Run(result.adapter.parent if result else folder, events)


def resume_run(run: Path, force: bool = False, stop_at: int = 0, **tables: Any) -> Run:
    """Resume a run. `stop_at` requests a stop after that step."""
    events: list[Event] = []

    def read(event: Event) -> None:
        events.append(event)
        if event["kind"] == "step" and event["step"] == stop_at:
            request(run, "stop")

    train(files.resolve(run / "options.toml", flags=tables), [read], resume=run, force=force)
    return Run(run, events)


def interrupted_run(folder: Path, stop_at: int, **tables: Any) -> Path:
    """Start a run and stop it after `stop_at` steps. Returns its folder."""
    run = folder / "runs/clay"

    def read(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == stop_at:
            request(run, "stop")

    train_run(folder, readers=[read], **tables)
    assert status_of(run).state == "stopped" and status_of(run).step == stop_at
    return run


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(run / "clay.safetensors")[0]


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
