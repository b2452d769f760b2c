"""What a run leaves in its folder: previews, adapters with their states, how the loss went, and the result."""

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
from .run.state import State, save_state
from .system.device import DTYPES, free_unused, memory_mb
from .system.formatting import format_bytes
from .system.out_of_memory import T, TooLarge, unless_too_large
from .training.export import TrainingProgress, export, metadata_of
from .training.lora import AdaptedLayer
from .training.optimizer_step import StepOutcome, Update
from .training.validation import Validation


class Artifacts:
    """Begins with what the run's `state` tells; every method that takes a step is about the adapter after so many."""

    def __init__(
        self,
        job: Job,
        base: Base,
        trained: list[AdaptedLayer],
        update: Update,
        validation: Validation | None,
        state: State,
        run: RunFolder,
        events: Events,
    ):
        self.job, self.base, self.trained, self.update, self.validation = job, base, trained, update, validation
        self.state, self.run, self.events = state, run, events
        self.losses, self.checkpoints = list(state.losses), list(state.checkpoints)
        self.validated = dict(state.validation_losses)
        self.gallery = Gallery(base, job.preview_prompts, job.options.previews.sampler, run.path / "previews", events)
        self.gallery.restore(state.rows)
        self.preview_s: list[float] = []
        self.trained_s = 0.0
        self.never_fits: set[str] = set()

    @property
    def path(self) -> Path:
        """Of the finished adapter."""
        return self.run.path / f"{self.job.options.output.output_name}.safetensors"

    def before(self, step: int) -> None:
        """What is due before the next step, in a new run or where a state says that it was not done."""
        if falls_on(step, self.job.plan.preview_every) and not self.gallery.has(step):
            self.preview(step)
        if not step:
            self.validate(step)

    def tell(self, outcome: StepOutcome, seconds: float) -> None:
        """A step that took so long."""
        done = outcome.step + 1
        self.trained_s += seconds
        if not outcome.non_finite:
            self.losses.append(outcome.loss)
        self.events.emit(
            "step", step=done, epoch=self.epoch(done), loss=None if outcome.non_finite else outcome.loss,
            num_steps=self.job.plan.num_steps, learning_rate=outcome.learning_rate, memory_mb=memory_mb(self.job.accelerator.device),
            steps_per_s=round((done - self.state.step) / self.trained_s, 3),
        )  # fmt: skip
        self.run.beat(done, self.job.plan.num_steps)

    def is_due(self, step: int) -> bool:
        """Whether `after` has something to do that nobody asked for."""
        plan = self.job.plan
        return step == plan.num_steps or falls_on(step, plan.save_every) or falls_on(step, plan.preview_every)

    def after(self, step: int, asked: Collection[str], is_whole: bool) -> None:
        """What is due after a step, or asked for; nothing is saved after one that was not whole."""
        plan, is_last = self.job.plan, step == self.job.plan.num_steps
        if is_whole and not is_last and ("save" in asked or falls_on(step, plan.save_every)):
            file = self.run.path / "checkpoints" / f"{self.path.stem}-{step:06}.safetensors"
            self.save(step, file)
            if "save" in asked:
                self.events.emit("note", text=f"  saved as asked: {file}")
        due = falls_on(step, plan.preview_every) or (is_last and bool(plan.preview_every))
        if due and not is_last and self.share_of_one_more() > self.job.options.previews.preview_share:
            self.events.emit("note", text=f"  no preview at step {step}, for --preview-share")
            due = False
        if due or "sample" in asked:
            self.preview(step)

    def share_of_one_more(self) -> float:
        """Share of previews in the time of steps and previews, were there one more as long as the others are."""
        return share_of_previews(self.preview_s, self.trained_s)

    def preview(self, step: int) -> None:
        """A row of previews."""
        self.run.check_owner()
        began, epoch = time.monotonic(), self.epoch(step)
        label = f"epoch {epoch}" if step == epoch * self.job.plan.steps_per_epoch else f"step {step}"
        try:
            with self.update.finished_weights():
                self._in_room("preview", lambda: self.gallery.add(label if step else "before", epoch, step))
        except TooLarge as error:
            self.events.emit("note", text=f"  {error}; this row is left out")
        self.preview_s.append(time.monotonic() - began)

    def _in_room(self, what: str, compute: Callable[[], T]) -> T:
        """What `compute` gives; where it does not fit into memory, once more without the captured passes, which keep
        their own and are captured anew in the next step. Where that does not help, it is not tried again."""
        try:
            return compute()
        except TooLarge:
            if what in self.never_fits or not self.update.passes.forget():
                raise
        free_unused()
        try:
            return compute()
        except TooLarge:
            self.never_fits.add(what)
            raise

    def validate(self, step: int) -> None:
        """The loss on held-out pictures, where there are some."""
        if self.validation is None or step in self.validated:
            return
        measure = self.validation.loss

        def measured() -> float:
            if (loss := unless_too_large(measure)) is None:
                raise TooLarge("the held-out pictures do not fit into memory", UNAVAILABLE)
            return loss

        try:
            with self.update.finished_weights():
                loss = self._in_room("validation", measured)
        except TooLarge as error:
            self.events.emit("note", text=f"  {error}; they are left out")
            return
        self.validated[step] = loss
        self.events.emit(
            "validation", step=step, epoch=self.epoch(step), loss=loss, text=describe_validation(self.validated)
        )

    def save(self, step: int, file: Path, with_state: bool = True) -> None:
        """The adapter first, then the state."""
        self.run.check_owner()
        job, options, plan, epoch = self.job, self.job.options, self.job.plan, self.epoch(step)
        if not self.run.code:  # who stops a run does not wait for it, and an unbroken one would not measure here
            self.validate(step)
        progress = TrainingProgress(epoch, step, plan.num_epochs, plan.num_steps, self.state.started)
        metadata = metadata_of(self.base, options, plan.parts, job.image_set.examples, job.buckets, progress)
        with self.update.finished_weights():
            export(file, self.trained, metadata, DTYPES[options.output.save_precision])
        self.events.emit("saved", step=step, epoch=epoch, file=file.name, bytes=file.stat().st_size)
        if file != self.path:
            since = self.losses[-plan.save_every :] if plan.save_every else self.losses
            self.checkpoints.append((file.name, self.validated.get(step, fmean(since) if since else 0.0)))
            for name in surplus(self.checkpoints, options.output.keep_checkpoints, options.output.keep_count):
                (file.parent / name).unlink(missing_ok=True)
                self.checkpoints = [one for one in self.checkpoints if one[0] != name]
        if with_state:
            update = self.update
            now = replace(
                self.state, step=step, losses=self.losses, lr_factor=update.rate_factor,
                non_finite_in_a_row=update.broken_in_a_row, micro_batch=update.micro_batch, checkpointing_level=update.recomputed,
                bits=self.base.bits, compiled=update.is_compiled, rows=self.gallery.rows, checkpoints=self.checkpoints,
                validation_losses=list(self.validated.items()),
            )  # fmt: skip
            save_state(self.run.path, now, update.tensors(), update.optimizer_state(), self.run.check_owner)

    def finish(self, step: int, with_state: bool) -> None:
        """The result: the adapter, read back and compared; its cover; the loss as a curve."""
        folder, name = self.run.path, self.path.stem
        self.save(step, self.path, with_state)
        if self.gallery.cover:
            write_png(self.gallery.cover, folder / f"{name}.png")
        if self.losses:
            write_png(loss_curve(self.losses, f"{name}: loss", self.validated), folder / "loss.png")
        text = f"adapter {self.path} ({format_bytes(self.path.stat().st_size)})"
        if (previews := folder / "previews").is_dir():
            text += f", previews {previews}"
        if total := sum(self.preview_s):
            text += f"\npreviews took {total / (total + self.trained_s):.0%} of the time of steps and previews"
        if self.validated:
            text += f"\n{describe_lowest_validation(self.validated, [name for name, _ in self.checkpoints])}"
        if self.run.code:
            text += f"\nstopped after step {step} of {self.job.plan.num_steps}; `scumble train {folder}` goes on"
        self.events.emit("done", step=step, epoch=self.epoch(step), stopped=bool(self.run.code), text=text)

    def epoch(self, step: int) -> int:
        """That a step belongs to, from 1; 0 before the first."""
        return ceil(step / self.job.plan.steps_per_epoch)


def falls_on(step: int, every: int) -> bool:
    """Whether what is done every so many steps, never where that is 0, is due."""
    return bool(every) and step % every == 0


def share_of_previews(seconds: Sequence[float], trained_s: float) -> float:
    """Their share of the time of steps and previews, were there one more as long as the others are."""
    if not seconds:
        return 0.0
    total = sum(seconds) + fmean(seconds)
    return total / (total + trained_s)


def describe_validation(validated: Mapping[int, float]) -> str:
    """The latest loss on held-out pictures, against that of the base."""
    step, loss = list(validated.items())[-1]
    change = f", {loss / validated[0] - 1:+.1%} against before" if step and validated.get(0) else ""
    return f"  held-out pictures, step {step}: loss {loss:.4f}{change}"


def describe_lowest_validation(validated: Mapping[int, float], checkpoints: Sequence[str]) -> str:
    """After which step the loss on held-out pictures was lowest, and which of `checkpoints` is of that step."""
    best, last = min(validated, key=lambda step: validated[step]), max(validated)
    text = f"held-out pictures: loss {validated[last]:.4f} after step {last}"
    if best == last:
        return f"{text}, the lowest of all; more steps may still help"
    text += f", but {validated[best]:.4f} after step {best}; what came later did not help with pictures unseen"
    file = next((name for name in checkpoints if name.endswith(f"-{best:06}.safetensors")), "")
    return f"{text}: see checkpoints/{file}" if file else text
