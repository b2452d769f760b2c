"""What a run leaves in its folder: previews, checkpoints with their states, the loss curve and the finished adapter."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from statistics import fmean

from scumble.configs.exit_codes import UNAVAILABLE

from .base_model.load import Base
from .plan.job import Job
from .previews.gallery import Gallery
from .previews.grid import write_png
from .run.events import Events
from .run.folder import RunFolder
from .run.loss_plot import loss_curve
from .run.retention import surplus
from .run.slowdown import SlowdownWatch
from .run.state import State, save_state
from .system.device import DTYPES, free_unused, memory_mb
from .system.formatting import format_bytes
from .system.out_of_memory import T, TooLarge, unless_too_large
from .training.export import TrainingProgress, export, metadata_of
from .training.lora import AdaptedLayer
from .training.optimizer_step import OptimizerStep, StepOutcome
from .training.validation import Validation


class Artifacts:
    """Records steps and writes the files that are due after them, continuing from the run's `state`.

    `done` is the number of recorded steps, `last_finite` the last number of steps whose weights gave a finite loss.
    """

    def __init__(
        self,
        job: Job,
        base: Base,
        adapter: list[AdaptedLayer],
        optimizer_step: OptimizerStep,
        validation: Validation | None,
        state: State,
        run: RunFolder,
        events: Events,
    ):
        self.job, self.base, self.adapter, self.validation = job, base, adapter, validation
        self.optimizer_step, self.state, self.run, self.events = optimizer_step, state, run, events
        self.done, self.last_finite, self.is_finite = state.step, state.step, True
        self.losses, self.checkpoints = list(state.losses), list(state.checkpoints)
        self.validation_losses = dict(state.validation_losses)
        self.gallery = Gallery(base, job.preview_prompts, job.options.previews.sampler, run.path / "previews", events)
        self.gallery.restore(state.rows)
        self.slowdown = SlowdownWatch(job.accelerator.device)
        self.clock = time.monotonic()
        self.training_s, self.preview_s = 0.0, list[float]()
        self.never_fits: set[str] = set()

    @property
    def path(self) -> Path:
        """The file of the finished adapter."""
        return self.run.path / f"{self.job.options.output.output_name}.safetensors"

    def before(self, step: int) -> None:
        """Write what is due before the next step, in a new run or if a state says that it was not done."""
        if falls_on(step, self.job.plan.preview_every) and not self.gallery.has(step):
            self.preview(step)
        if not step:
            self.validate(step)
        self.clock = time.monotonic()

    def record(self, outcome: StepOutcome) -> None:
        """Record a step that has just ended."""
        seconds, self.clock = time.monotonic() - self.clock, time.monotonic()
        self.training_s += seconds
        self.done, self.is_finite = outcome.step + 1, not outcome.non_finite
        if self.is_finite:
            self.last_finite = outcome.step  # the loss of a step is that of the weights before it
            self.losses.append(outcome.loss)
        self.events.emit(
            "step", step=self.done, epoch=self.epoch(self.done), loss=outcome.loss if self.is_finite else None,
            num_steps=self.job.plan.num_steps, learning_rate=outcome.learning_rate,
            memory_mb=memory_mb(self.job.accelerator.device),
            steps_per_s=round((self.done - self.state.step) / self.training_s, 3),
        )  # fmt: skip
        self.run.beat(self.done, self.job.plan.num_steps)
        if slow := self.slowdown.add(seconds):
            self.events.emit("note", text=f"  {slow}")

    def is_due(self, step: int) -> bool:
        """Whether `after` has something to do even if nothing is requested."""
        plan = self.job.plan
        return step == plan.num_steps or falls_on(step, plan.save_every) or falls_on(step, plan.preview_every)

    def after(self, asked: Collection[str]) -> None:
        """Write what is due after the latest step or `asked` for. Nothing is saved after a step that was not finite."""
        step, plan = self.done, self.job.plan
        is_last = step == plan.num_steps
        if self.is_finite and not is_last and ("save" in asked or falls_on(step, plan.save_every)):
            file = self.run.path / "checkpoints" / f"{self.path.stem}-{step:06}.safetensors"
            self.save(step, file)
            if "save" in asked:
                self.events.emit("note", text=f"  saved as requested: {file}")
        due = falls_on(step, plan.preview_every) or (is_last and bool(plan.preview_every))
        if due and not is_last and share_of_previews(self.preview_s, self.training_s) > self.max_preview_share:
            self.events.emit("note", text=f"  preview at step {step} skipped (--preview-share)")
            due = False
        if due or "sample" in asked:
            self.preview(step)
        self.clock = time.monotonic()

    @property
    def max_preview_share(self) -> float:
        return self.job.options.previews.preview_share

    def preview(self, step: int) -> None:
        """Render a row of previews."""
        self.run.check_owner()
        began, epoch = time.monotonic(), self.epoch(step)
        label = f"epoch {epoch}" if step == epoch * self.job.plan.steps_per_epoch else f"step {step}"
        try:
            with self.optimizer_step.finished_weights():
                self._in_memory("preview", lambda: self.gallery.add(label if step else "before", epoch, step))
        except TooLarge as error:
            self.events.emit("note", text=f"  {error}; this row of previews is skipped")
        self.preview_s.append(time.monotonic() - began)

    def _in_memory(self, what: str, compute: Callable[[], T]) -> T:
        """The result of `compute`; if it does not fit into memory, once more without captured passes, which hold some.

        They are captured anew in the next step. If that does not help, it is not tried again.
        """
        try:
            return compute()
        except TooLarge:
            if what in self.never_fits or not self.optimizer_step.passes.forget():
                raise
        free_unused()
        try:
            return compute()
        except TooLarge:
            self.never_fits.add(what)
            raise

    def validate(self, step: int) -> None:
        """Measure the validation loss, if images are held out."""
        if self.validation is None or step in self.validation_losses:
            return
        measure = self.validation.loss

        def measured() -> float:
            if (loss := unless_too_large(measure)) is None:
                raise TooLarge("the validation images do not fit into memory", UNAVAILABLE)
            return loss

        try:
            with self.optimizer_step.finished_weights():
                loss = self._in_memory("validation", measured)
        except TooLarge as error:
            self.events.emit("note", text=f"  {error}; validation is skipped")
            return
        self.validation_losses[step] = loss
        text = describe_validation(self.validation_losses)
        self.events.emit("validation", step=step, epoch=self.epoch(step), loss=loss, text=text)

    def save(self, step: int, file: Path, with_state: bool = True) -> None:
        """Save the adapter first, then the state."""
        self.run.check_owner()
        job, options, plan, epoch = self.job, self.job.options, self.job.plan, self.epoch(step)
        if not self.run.code:  # do not delay a stop; an uninterrupted run does not validate here
            self.validate(step)
        progress = TrainingProgress(epoch, step, plan.num_epochs, plan.num_steps, self.state.started)
        metadata = metadata_of(self.base, options, plan.parts, job.image_set.examples, job.buckets, progress)
        with self.optimizer_step.finished_weights():
            export(file, self.adapter, metadata, DTYPES[options.output.save_precision])
        self.events.emit("saved", step=step, epoch=epoch, file=file.name, bytes=file.stat().st_size)
        if file != self.path:
            since = self.losses[-plan.save_every :] if plan.save_every else self.losses
            self.checkpoints.append((file.name, self.validation_losses.get(step, fmean(since) if since else 0.0)))
            for name in surplus(self.checkpoints, options.output.keep_checkpoints, options.output.keep_count):
                (file.parent / name).unlink(missing_ok=True)
                self.checkpoints = [one for one in self.checkpoints if one[0] != name]
        if with_state:
            self._save_state(step)

    def _save_state(self, step: int) -> None:
        optimizer_step, fallback = self.optimizer_step, self.optimizer_step.fallback
        state = replace(
            self.state, step=step, losses=self.losses, lr_factor=optimizer_step.lr_factor,
            non_finite_in_a_row=optimizer_step.non_finite_in_a_row, micro_batch=fallback.micro_batch,
            checkpointing_level=fallback.checkpointing_level, bits=self.base.bits,
            compiled=optimizer_step.passes.is_compiled, rows=self.gallery.rows, checkpoints=self.checkpoints,
            validation_losses=list(self.validation_losses.items()),
        )  # fmt: skip
        tensors, optimizer = optimizer_step.tensors(), optimizer_step.optimizer_state()
        save_state(self.run.path, state, tensors, optimizer, self.run.check_owner)

    def finish(self, with_state: bool) -> None:
        """Write the finished adapter, read back and compared, its cover image and the loss curve."""
        folder, name, step = self.run.path, self.path.stem, self.done
        self.save(step, self.path, with_state)
        if self.gallery.cover:
            write_png(self.gallery.cover, folder / f"{name}.png")
        if self.losses:
            write_png(loss_curve(self.losses, f"{name}: loss", self.validation_losses), folder / "loss.png")
        lines = [f"adapter: {self.path} ({format_bytes(self.path.stat().st_size)})"]
        if (previews := folder / "previews").is_dir():
            total = sum(self.preview_s)
            share = f" ({total / (total + self.training_s):.0%} of run time)" if total else ""
            lines.append(f"previews: {previews}{share}")
        if self.validation_losses:
            lines.append(describe_lowest_validation(self.validation_losses, [file for file, _ in self.checkpoints]))
        if self.run.code:
            lines.append(
                f"stopped after step {step} of {self.job.plan.num_steps}; resume with `scumble train {folder}`"
            )
        is_stopped = bool(self.run.code)
        self.events.emit("done", step=step, epoch=self.epoch(step), stopped=is_stopped, text="\n".join(lines))

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to, from 1; 0 before the first step."""
        return ceil(step / self.job.plan.steps_per_epoch)


def falls_on(step: int, every: int) -> bool:
    """Whether something that is done every `every` steps (0: never) is due after `step`."""
    return bool(every) and step % every == 0


def share_of_previews(seconds: Sequence[float], training_s: float) -> float:
    """The share of previews in the run time if there were one more that takes as long as the others on average."""
    if not seconds:
        return 0.0
    total = sum(seconds) + fmean(seconds)
    return total / (total + training_s)


def describe_validation(losses: Mapping[int, float]) -> str:
    """The latest validation loss, compared with that of the base."""
    step, loss = list(losses.items())[-1]
    change = f", {loss / losses[0] - 1:+.1%} compared with the base" if step and losses.get(0) else ""
    return f"  validation, step {step}: loss {loss:.4f}{change}"


def describe_lowest_validation(losses: Mapping[int, float], checkpoints: Sequence[str]) -> str:
    """After which step the validation loss was lowest, and which of the `checkpoints` is of that step."""
    lowest, last = min(losses, key=lambda step: losses[step]), max(losses)
    text = f"validation: loss {losses[last]:.4f} after step {last}"
    if lowest == last:
        return f"{text}, the lowest of the run; more steps may lower it further"
    text += f"; it was lowest after step {lowest} ({losses[lowest]:.4f}) and has risen on unseen images since"
    file = next((name for name in checkpoints if name.endswith(f"-{lowest:06}.safetensors")), "")
    return f"{text}: compare checkpoints/{file}" if file else text
