"""Faults of real machines: kills, full disks, non-finite values, too little memory, slow steps.

`python tests/faults/kills.py --kills 20` is the long version of the kill test, for every optimizer.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from faults.disks import MOUNTED, ORDINARY, Disk
from faults.kills import OPTIMIZERS, run_kill_test
from runs import SAMPLES, train_run
from small_parts import recorded

from scumble.configs import files
from scumble.configs.errors import Refused
from scumble.configs.options import Model, Previews
from scumble.trainer import train as recipe
from scumble.trainer.adapters.files import read_tensors
from scumble.trainer.base_model.detect import detect_base
from scumble.trainer.base_model.latents import _posteriors
from scumble.trainer.base_model.load import Base, load
from scumble.trainer.previews.prompts import preview_prompts
from scumble.trainer.previews.sampling import render
from scumble.trainer.run.events import Event
from scumble.trainer.run.folder import status_of
from scumble.trainer.run.retention import check_disk, disk_needed, surplus
from scumble.trainer.run.slowdown import SlowdownWatch
from scumble.trainer.run.state import newest_state
from scumble.trainer.system.formatting import format_bytes
from scumble.trainer.train import train
from scumble.trainer.training.flat_parameters import FlatParameters
from scumble.trainer.training.forward_backward import Passes
from scumble.trainer.training.memory_fallback import MemoryFallback
from scumble.trainer.training.objective import Batch, Objectives, Sample
from scumble.trainer.training.optimizer_step import HALVED_AFTER, STOPPED_AFTER, OptimizerStep, StepOutcome
from scumble.trainer.training.optimizers import make_optimizer, param_groups

CPU = torch.device("cpu")


@pytest.mark.slow
def test_a_run_killed_at_random_instants_resumes_bit_for_bit(tmp_path: Path):
    result = run_kill_test("adamw", kills=4, folder=tmp_path, steps=4)
    assert result.differing == [] and result.kills == 4 and result.while_writing == 2


@pytest.mark.long
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_of_every_optimizer_survives_many_kills(optimizer: str, tmp_path: Path):
    result = run_kill_test(optimizer, kills=10, folder=tmp_path)
    assert result.differing == [] and result.kills == 10 and result.while_writing == 5


class Line:
    """A simple loss, (weight * x - 1)² with x from the sample index. The loss of `broken` steps is NaN."""

    seed = 0

    def __init__(self, weight: torch.nn.Parameter, broken: Sequence[int] = (), fits: int = 1000):
        self.weight, self.broken, self.fits, self.largest = weight, broken, fits, 0

    def batch(self, samples: Sequence[Sample]) -> Batch:
        self.largest = max(self.largest, len(samples))
        weight = math.nan if samples[0].step in self.broken else 1.0
        return {"x": torch.tensor([1.0 + sample.index for sample in samples]), "weight": torch.tensor(weight)}

    def losses_of(self, batch: Batch) -> torch.Tensor:
        if len(batch["x"]) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (self.weight * batch["x"] - 1).pow(2) * batch["weight"]


class Fp16Accelerator(Accelerator):
    """Accelerate's fp16 mode on the CPU, which accelerate does not offer."""

    def __init__(self, scale: float):
        super().__init__(cpu=True)
        self.scaler, self.native_amp = torch.amp.GradScaler("cpu", init_scale=scale), True

    @property
    def mixed_precision(self) -> str:
        return "fp16"


def update_of(
    broken: Sequence[int] = (), fits: int = 1000, accelerator: Accelerator | None = None
) -> tuple[OptimizerStep, Line, list[str]]:
    weight, notes = torch.nn.Parameter(torch.tensor(0.1)), []
    line = Line(weight, broken, fits)
    flat = FlatParameters([[weight]])
    optimizer = make_optimizer("adamw", param_groups([(0.01, [weight])]), 0.0, flat)
    accelerator = accelerator or Accelerator(cpu=True)
    passes = Passes(line, flat, accelerator.backward)
    fallback = MemoryFallback(passes, accelerator.device, notes.append)
    update = OptimizerStep(accelerator, passes, {"w": weight}, flat, optimizer, 1.0, 0.0, fallback, report=notes.append)
    return update, line, notes


def taken(update: OptimizerStep, step: int, batches: Sequence[Sequence[int]]) -> StepOutcome:
    update.take(step, batches, 1.0)
    (outcome,) = update.outcomes()
    return outcome


def test_a_non_finite_step_is_skipped_and_several_in_a_row_halve_the_learning_rate():
    update, line, notes = update_of(broken=range(2, 2 + HALVED_AFTER))
    values = [float(line.weight)]
    for step in range(8):
        outcome = taken(update, step, [[0, 1], [2]])
        assert outcome.non_finite == ("loss" if step in line.broken else "")
        values.append(float(line.weight))
    assert values[2] == values[3] == values[4] == values[5] and values[5] != values[6]
    assert update.optimizer.param_groups[0]["lr"] == 0.005 and not outcome.is_hopeless
    expected = [f"step {step}: the loss is not finite; the step is skipped" for step in (3, 4, 5)]
    expected[-1] += f", and after {HALVED_AFTER} in a row the learning rate is halved"
    assert notes == expected


@pytest.mark.parametrize("limit", [0.0, 1.0, 2.0, 2.0000005, 3.0])
def test_gradient_clipping_matches_torch(limit: float):
    update, line, _ = update_of()
    update.max_grad_norm = limit
    other = torch.nn.Parameter(line.weight.detach().clone())
    update.flat.gradients[0].fill_(-2.0)
    other.grad = torch.full_like(other, -2.0)
    norm = torch.nn.utils.clip_grad_norm_([other], limit or math.inf)
    assert update._clip() == float(norm)
    assert float(update.flat.gradients[0]) == float(other.grad)


def test_loss_scaling_gives_the_same_steps_and_an_overflow_is_skipped_and_lowers_the_scale():
    plain, line, _ = update_of()
    scaled, other, _ = update_of(accelerator=Fp16Accelerator(1024.0))
    for step in range(4):  # gradient norms above 1, so that clipping has an effect
        outcomes = [taken(update, step, [[0, 1], [2]]) for update in (plain, scaled)]
        assert outcomes[0] == outcomes[1]
        torch.testing.assert_close(other.weight, line.weight, rtol=1e-6, atol=0)
    again, third, _ = update_of(accelerator=Fp16Accelerator(1.0))
    again.restore(scaled.tensors(), scaled.optimizer_state())
    assert again.optimizer_state()["scaler"] == scaled.optimizer_state()["scaler"]
    large, fourth, notes = update_of(accelerator=Fp16Accelerator(3e38))
    before = float(fourth.weight)
    assert taken(large, 0, [[0, 1], [2]]).non_finite == "" and float(fourth.weight) == before
    assert large.optimizer_state()["scaler"]["scale"] == pytest.approx(1.5e38) and notes == []
    for update, weight in ((scaled, other.weight), (again, third.weight)):
        taken(update, 4, [[0, 1], [2]])
        assert float(weight) == float(other.weight)


def test_a_run_stops_if_its_steps_stay_non_finite():
    update, _, _ = update_of(broken=range(100))
    steps = 1
    while not taken(update, steps, [[0]]).is_hopeless:
        steps += 1
    assert steps == STOPPED_AFTER


@pytest.mark.parametrize("fits", [4, 3, 2, 1])
def test_a_step_that_does_not_fit_is_split_with_the_same_gradient(fits: int):
    whole, line, _ = update_of()
    taken(whole, 0, [[0, 1, 2, 3], [4, 5]])
    split, other, notes = update_of(fits=fits)
    recomputed = []
    split.fallback.checkpointing = [lambda: recomputed.append(1)]
    outcome = taken(split, 0, [[0, 1, 2, 3], [4, 5]])
    torch.testing.assert_close(other.weight.detach(), line.weight.detach(), rtol=1e-6, atol=0)
    assert not outcome.non_finite and recomputed == ([1] if fits < 4 else [])
    assert [line for line in notes if "same effective batch size" in line] if fits < 4 else notes == []
    assert split.fallback.micro_batch == {4: 0, 3: 2, 2: 2, 1: 1}[fits]


def test_captured_passes_are_dropped_first_if_memory_runs_out(monkeypatch: pytest.MonkeyPatch):
    update, line, notes = update_of()
    update.fallback.checkpointing = [lambda: pytest.fail("nothing needs to be recomputed")]
    update.passes.captured.capture = recorded
    taken(update, 0, [[0, 1]])
    losses_of, sizes = line.losses_of, []

    def fail_once(batch: Batch) -> torch.Tensor:
        sizes.append(len(batch["x"]))
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses_of(batch)

    monkeypatch.setattr(line, "losses_of", fail_once)
    assert taken(update, 1, [[0, 1, 2]]).non_finite == "" and set(sizes) == {3} and notes == []
    line.fits, update.fallback.checkpointing = 0, []
    monkeypatch.setattr(line, "losses_of", losses_of)
    with pytest.raises(Refused, match="step 3 does not fit"):
        taken(update, 2, [[0]])


def limited(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, max_size: int) -> list[int]:
    """Make a method run out of memory for batches above `max_size`. Returns the list of attempted batch sizes."""
    tried: list[int] = []
    original = getattr(owner, method)

    def limited_method(self: Any, *args: Any, **kwargs: Any) -> Any:
        tried.append(len([*args, *kwargs.values()][0]))
        if tried[-1] > max_size:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, limited_method)
    return tried


def test_previews_that_do_not_fit_are_rendered_in_smaller_batches_and_are_the_same(monkeypatch: pytest.MonkeyPatch):
    model = Model(base="sketch")
    base = load(model, detect_base(model), CPU, torch.float32)
    prompts = preview_prompts(Previews(prompts=("owl", "fox", "cup"), num_inference_steps=2), 64, [], 5.0)
    whole = render(base, prompts, "ddim")
    tried = limited(monkeypatch, StableDiffusionPipeline, "__call__", 1)
    parts = render(base, prompts, "ddim")
    assert tried == [3, 1, 2, 1, 1]
    assert (
        max(abs(np.asarray(one, int) - np.asarray(two, int)).max() for one, two in zip(whole, parts, strict=True)) <= 1
    )


def test_a_preview_that_does_not_fit_is_skipped_and_the_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    limited(monkeypatch, StableDiffusionPipeline, "__call__", 0)
    run = train_run(tmp_path, optimization={"steps": 2}, output={"preview_every": 2})
    assert len(run.losses) == 2 and not run.of("preview") and (run.folder / "clay.safetensors").is_file()
    notes = [event["text"].strip() for event in run.of("note") if "preview" in event["text"]]
    assert set(notes) == {
        "a preview of 64x64 does not fit into memory; lower --preview-size; this row of previews is skipped"
    }  # fmt: skip


def test_latents_that_do_not_fit_are_encoded_in_smaller_batches(monkeypatch: pytest.MonkeyPatch):
    model = Model(base="sketch")
    vae = load(model, detect_base(model), CPU, torch.float32).vae
    pixels = torch.rand(5, 3, 64, 64)
    with torch.no_grad():
        (whole,) = _posteriors(vae, pixels)
        tried = limited(monkeypatch, AutoencoderKL, "encode", 2)
        parts = torch.cat([part.mean for part in _posteriors(vae, pixels)])
        assert tried == [5, 3, 2, 1, 2]
        torch.testing.assert_close(parts, whole.mean, rtol=1e-4, atol=1e-5)
        limited(monkeypatch, AutoencoderKL, "encode", 0)
        with pytest.raises(Refused, match="encoding 64x64 px does not fit into memory; lower --resolution"):
            _posteriors(vae, pixels)


def test_a_lost_device_stops_the_run_and_it_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    batch = Objectives.batch

    def lost(self: Objectives, samples: Sequence[Sample]) -> Batch:
        if samples[0].step == 2:
            raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronous")
        return batch(self, samples)

    monkeypatch.setattr(Objectives, "batch", lost)
    expected = (
        r"the cpu device failed \(CUDA error: unspecified launch failure\); .*; then resume with `scumble train .*clay`"
    )
    with pytest.raises(Refused, match=expected) as error:
        train_run(tmp_path, optimization={"steps": 4}, output={"preview_every": 0, "save_every": 1})
    run = tmp_path / "runs/clay"
    loaded = newest_state(run, pytest.fail)
    assert error.value.exit_code == 75 and status_of(run).state == "stopped" and loaded and loaded.state.step == 2


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_full_device_is_reported_in_one_line(dry_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(base: Base, *modules: torch.nn.Module) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(recipe, "fetch", full)
    expected = "the cpu device is out of memory; close other programs that use it"
    with pytest.raises(Refused, match=expected) as error:
        if dry_run:
            train(files.resolve(flags={"data": {"images": str(SAMPLES)}}), [], dry_run=True, measured=True)
        else:
            train_run(tmp_path)
    assert error.value.exit_code == 75


def test_a_step_that_does_not_fit_stops_the_run_and_it_can_be_resumed():
    update, _, _ = update_of(fits=0)
    with pytest.raises(Refused, match="step 1 does not fit into the memory of the cpu device; close other") as error:
        update.take(0, [[0, 1]], 1.0)
    assert error.value.exit_code == 75


def test_a_run_with_non_finite_values_falls_back_to_its_last_good_state(tmp_path: Path):
    optimization = {
        "steps": 60,
        "learning_rate": 100.0,
        "text_encoder_lr": 100.0,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0.0,
        "max_grad_norm": 0.0,
    }
    with pytest.raises(Refused, match=r"the adapter as of step \d+ is .*clay\.safetensors") as error:
        train_run(tmp_path, optimization=optimization, output={"preview_every": 0, "save_every": 1})
    run = tmp_path / "runs/clay"
    assert error.value.exit_code == 2 and status_of(run).state == "failed"
    tensors, metadata = read_tensors(run / "clay.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    losses = [event["loss"] for event in map(json.loads, (run / "events.jsonl").read_text().splitlines())
              if event["kind"] == "step"]  # fmt: skip
    last_finite = max(step for step, loss in enumerate(losses) if loss is not None)  # loss of the weights after it
    assert int(metadata["ss_steps"]) == last_finite and losses[-1] is None
    loaded = newest_state(run, pytest.fail)
    assert loaded and loaded.state.non_finite_in_a_row == 0 and loaded.state.step == last_finite + 1


@pytest.fixture(params=[MOUNTED, ORDINARY])
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk", request.param)
    yield made
    made.remove()


def test_a_full_disk_stops_the_run_without_loss_and_reports_how_to_resume(tmp_path: Path, disk: Disk):
    def fill(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 3:
            disk.fill()

    tables: dict[str, Any] = {
        "network": {"rank": 2, "text_encoder_rank": 0},
        "optimization": {"steps": 6},
        "output": {"output_dir": str(disk.place), "preview_every": 0, "save_every": 2, "save_precision": "fp32"},
    }
    with pytest.raises(
        Refused, match=rf"cannot be written \(.*\); then resume with `scumble train {disk.place}/clay`"
    ) as error:
        train_run(tmp_path, readers=[fill], **tables)
    assert error.value.exit_code == 73
    run = disk.place / "clay"
    assert status_of(run).state == "stopped" and "cannot be written" in status_of(run).reason
    loaded = newest_state(run, pytest.fail)
    assert loaded and loaded.state.step == 2
    for path in run.rglob("*.safetensors"):
        read_tensors(path)
    disk.restore()
    again = subprocess.run(
        [sys.executable, "-m", "scumble.trainer.cli", "train", str(run)], capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    tables["output"] |= {"output_dir": str(tmp_path / "whole")}
    uninterrupted = train_run(tmp_path / "whole", **tables)
    ours, theirs = read_tensors(run / "clay.safetensors")[0], read_tensors(uninterrupted.folder / "clay.safetensors")[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_too_little_disk_space_is_refused_before_training_with_the_required_space(tmp_path: Path):
    with pytest.raises(
        Refused, match=r"--output-dir .*: the run needs up to 1000000\.0 GB, but only .* is free; free up space"
    ) as error:
        check_disk(tmp_path / "runs", 10**15)
    assert error.value.exit_code == 73
    assert check_disk(tmp_path / "runs", 10**6) > 10**6
    assert disk_needed(1000, 2, 10, "all", 3, False, 0) - disk_needed(1000, 2, 10, "last", 3, False, 0) == 6 * 2000
    assert [format_bytes(size) for size in (0, 620_400, 999_999, 38_060_000, 999_960_000, 6_934_786_702)] == [
        "0 kB", "620 kB", "1.0 MB", "38.1 MB", "1.0 GB", "6.9 GB"
    ]  # fmt: skip


def test_a_run_uses_no_more_disk_space_than_reported(tmp_path: Path):
    run = train_run(tmp_path, optimization={"steps": 4, "ema_decay": 0.5}, output={"preview_every": 1, "save_every": 1})
    used = sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
    (reported,) = (event["disk_bytes"] for event in run.of("measured"))
    assert 0.3 * reported < used <= reported


@pytest.mark.parametrize(
    ("keep", "kept"), [("all", "abcde"), ("last", "de"), ("best", "bd")]
)  # fmt: skip
def test_which_checkpoints_are_kept(keep: str, kept: str):
    saved = list(zip("abcde", [5.0, 1.0, 3.0, 2.0, 4.0], strict=True))
    assert sorted(set("abcde") - set(surplus(saved, keep, 2))) == list(kept)


def test_only_the_last_checkpoints_are_kept_on_request(tmp_path: Path):
    output = {"preview_every": 0, "save_every": 1, "keep_checkpoints": "last", "keep_count": 2}
    run = train_run(tmp_path, optimization={"steps": 6}, output=output)
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == [
        "clay-000004.safetensors", "clay-000005.safetensors",
    ]  # fmt: skip


def test_slow_steps_are_reported_once_and_steady_steps_never():
    steady, slow = SlowdownWatch(CPU), SlowdownWatch(CPU)
    assert not any(steady.add(0.1 + 0.05 * (step % 3)) for step in range(200))
    lines = [slow.add(0.1 if step < 50 else 0.4) for step in range(100)]
    assert len([line for line in lines if line]) == 1
    assert "4.0 times as long as before" in "".join(lines)
    assert next(step for step, line in enumerate(lines) if line) < 55


def test_an_image_deleted_before_encoding_is_named(tmp_path: Path):
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted(SAMPLES.iterdir())[:8]:
        (images / path.name).write_bytes(path.read_bytes())
    last = sorted(images.glob("*.webp"))[-1]

    def remove(event: Event) -> None:
        if event["kind"] == "encoded":
            last.unlink(missing_ok=True)

    expected = rf"{last}: cannot be opened \(No such file or directory\)"
    with pytest.raises(Refused, match=expected) as error:
        train_run(tmp_path, readers=[remove], data={"images": str(images), "latent_cache": str(tmp_path / "cache")})
    assert error.value.exit_code == 2 and status_of(tmp_path / "runs/clay").state == "failed"


def test_images_deleted_during_training_do_not_matter(tmp_path: Path):
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted(SAMPLES.iterdir())[:8]:
        (images / path.name).write_bytes(path.read_bytes())

    def remove(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 1:
            for path in images.iterdir():
                path.unlink()

    run = train_run(tmp_path, readers=[remove], data={"images": str(images)}, output={"preview_every": 0})
    assert len(run.losses) == 3


def test_an_unwritable_output_folder_stops_a_run_but_an_unwritable_cache_does_not(tmp_path: Path, disk: Disk):
    output = {"preview_every": 0, "output_dir": str(disk.place)}
    tables: dict[str, Any] = {"network": {"rank": 2, "text_encoder_rank": 0}, "output": output}
    run = train_run(tmp_path, optimization={"steps": 1}, **tables).folder
    disk.make_read_only()
    with pytest.raises(Refused, match=rf"--output-dir {disk.place}: .* cannot be created \(") as error:
        train_run(tmp_path, **tables)
    assert error.value.exit_code == 73
    longer = files.resolve(run / "options.toml", flags={"optimization": {"steps": 2}})
    with pytest.raises(
        Refused, match=rf"{run}.* cannot be written \(.*\); then resume with `scumble train {run}`"
    ) as error:
        train(longer, [], resume=run)
    assert error.value.exit_code == 73 and status_of(run).state == "done"
    without = train_run(
        tmp_path, data={"latent_cache": str(disk.place)}, optimization={"steps": 1}, output={"preview_every": 0}
    )
    (note,) = [event["text"] for event in without.of("note") if "--latent-cache" in event["text"]]
    assert f"--latent-cache {disk.place}" in note and note.endswith("continuing without the cache")
    assert len(without.losses) == 1


@pytest.mark.parametrize("lost_at", ["checkpoint", "export"])
def test_a_disk_that_becomes_read_only_stops_the_run_and_saved_files_stay_intact(
    tmp_path: Path, disk: Disk, lost_at: str
):
    def lose(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == {"checkpoint": 3, "export": 6}[lost_at]:
            disk.make_read_only()

    run = disk.place / "clay"
    with pytest.raises(Refused, match="cannot be written") as error:
        train_run(tmp_path, readers=[lose], network={"rank": 2, "text_encoder_rank": 0}, optimization={"steps": 6},
            output={"output_dir": str(disk.place), "preview_every": 0, "save_every": 2})  # fmt: skip
    assert error.value.exit_code == 73
    loaded = newest_state(run, pytest.fail)
    assert loaded and loaded.state.step == {"checkpoint": 2, "export": 4}[lost_at]
    disk.restore()
    train(files.resolve(run / "options.toml"), [], resume=run, force=True)
    assert status_of(run).state == "done"
