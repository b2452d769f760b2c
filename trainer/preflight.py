"""Before the long part: one real step at the largest batch, measured; what it takes, what fits, room on the disk."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from scumble.configs.words import counted
from scumble.datasets.batches import epoch_batches
from scumble.datasets.reading.images import Size

from .base_model.load import Base
from .kernels.compile import PAYS_S, compile_blocks
from .plan.job import Job
from .run.events import Events
from .run.retention import check_disk, disk_needed
from .system.device import DTYPES, total_memory_mb
from .system.formatting import duration, format_bytes
from .system.out_of_memory import StepCost, measure, timed
from .training.optimizer_step import Update


def try_out(
    job: Job, base: Base, update: Update, folder: Path, events: Events, done: int = 0, was_compiled: bool = False
) -> None:
    """Does a step fit, how long will the run take from step `done`, and is there room for what it leaves in `folder`?

    A run that goes on is compiled if it `was_compiled`, so that its numbers stay.
    Raises `Refused` (69) where no step fits into memory, (73) where the disk is too small.
    """
    options, plan, device = job.options, job.plan, job.accelerator.device
    largest = largest_batch(job.buckets, job.repeats, plan.batch_size)
    size = job.buckets[largest[0]]
    measured = measured_step(job, update, largest)
    steps, passes = plan.num_steps - done, options.optimization.gradient_accumulation_steps
    expected_s = steps * passes * measured.seconds
    wanted = options.machine.torch_compile
    pays = wanted == "auto" and not done and device.type == "cuda" and expected_s > PAYS_S
    if wanted == "on" or pays or (was_compiled and wanted != "off"):
        update.passes.forget()
        compiled_s = compile_blocks(
            base.unet, lambda: timed(lambda: update.trial(largest), device), measured.seconds,
            whatever=wanted == "on" or was_compiled, say=lambda line: events.emit("note", text=f"  {line}"),
        )  # fmt: skip
        update.passes.forget()
        update.is_compiled = compiled_s is not None
        if update.is_compiled and device.type == "cpu":
            update.passes.disable_capture()  # a recording knows nothing of compiled kernels
        measured = replace(measured, seconds=compiled_s or measured.seconds)
    step_s = measured.seconds * passes
    num_saves = plan.num_steps // plan.save_every if plan.save_every else 0
    num_previews = plan.num_steps // plan.preview_every + 2 if plan.preview_every else 0
    pixels = sum((shot.width or size.width) * (shot.height or size.height) for shot in job.preview_prompts)
    num_parameters = sum(parameter.numel() for parameter in update.named.values())
    needed = disk_needed(
        num_parameters, DTYPES[options.output.save_precision].itemsize, num_saves, options.output.keep_checkpoints,
        options.output.keep_count, bool(options.optimization.ema_decay), num_previews * pixels,
    )  # fmt: skip
    free = check_disk(folder, needed)
    checkpointing = options.machine.gradient_checkpointing is True or update.recomputed > 0
    recomputed = "some activations recomputed" if update.recomputed and update.recompute else "activations recomputed"
    savings = [
        *([recomputed] if checkpointing else []),
        *([f"{counted(update.micro_batch, 'picture')} at once"] if update.micro_batch else []),
        *([f"a base of {base.bits} bits"] if base.bits < 16 else []),
    ]
    events.emit(
        "measured", seconds=round(measured.seconds, 4), memory_mb=measured.memory_mb, expected_s=round(steps * step_s),
        gradient_checkpointing=checkpointing, micro_batch=update.micro_batch, bits=base.bits, disk_bytes=needed,
        text=f"  a step takes {step_s:.2f} s and {measured.memory_mb:,} of {total_memory_mb(device):,} MB"
        f"{''.join(f', {saving}' for saving in savings)}: {steps} steps in about {duration(steps * step_s)} without "
        f"previews; up to {format_bytes(needed)} of {format_bytes(free)} free on the disk",
    )  # fmt: skip


def measured_step(job: Job, update: Update, batch: Sequence[int]) -> StepCost:
    """What a pass of a batch takes. Raises `Refused` (69) where none fits into memory."""
    trials = count()

    def trial() -> None:
        """By other numbers from the second on: they prove what the first recorded, where a CPU's passes are."""
        step = min(next(trials), 1)
        update.trial(batch_like(batch, job, step), step)

    def need_less() -> bool:
        nonlocal trials
        trials = count()
        return update.need_less(len(batch))

    cure = f"{counted(len(batch), 'picture')} of {job.buckets[batch[0]]} at once; lower --batch-size or --resolution"
    return measure(trial, job.accelerator.device, need_less, cure)


def batch_like(batch: Sequence[int], job: Job, epoch: int) -> Sequence[int]:
    """A batch of an epoch of as many looks at pictures of the same size, with masks or without: of other examples,
    where there are others."""

    def shape(one: Sequence[int]) -> tuple[object, ...]:
        return len(one), job.buckets[one[0]], any(job.masks[index] for index in one)

    batches = epoch_batches(job.buckets, job.repeats, job.plan.batch_size, seed=0, epoch=epoch)
    return next((one for one in batches if shape(one) == shape(batch)), batch)


def largest_batch(buckets: Sequence[Size], repeats: Sequence[int], batch: int) -> list[int]:
    """Example indices of the batch that needs the most memory: most pixels in all."""
    batches = epoch_batches(buckets, repeats, batch, seed=0, epoch=0)
    return max(batches, key=lambda one: len(one) * buckets[one[0]].width * buckets[one[0]].height)
