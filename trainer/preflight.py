"""Measure a real step with the largest batch before training: whether it fits, and how long the run will take."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from scumble.configs.words import counted
from scumble.datasets.batches import epoch_batches
from scumble.datasets.reading.images import Size

from .base_model.load import Base
from .kernels.compile import MIN_RUN_S, compile_blocks
from .plan.job import Job
from .run.events import Events
from .run.retention import check_disk, disk_needed
from .system.device import DTYPES, total_memory_mb
from .system.formatting import duration, format_bytes
from .system.out_of_memory import StepCost, measure, timed
from .training.optimizer_step import OptimizerStep


def try_out(
    job: Job,
    base: Base,
    optimizer_step: OptimizerStep,
    folder: Path,
    events: Events,
    done: int = 0,
    was_compiled: bool = False,
) -> None:
    """Measure a step; estimate the time from step `done` on; check that the disk has room for what the run writes.

    A resumed run is compiled if it `was_compiled`, so that its numbers stay the same. Raises `Refused` (69) if no step
    fits into memory, (73) if the disk is too small.
    """
    plan, device = job.plan, job.accelerator.device
    largest = largest_batch(job.buckets, job.repeats, plan.batch_size)
    cost = measured_step(job, optimizer_step, largest)
    num_steps, passes_per_step = plan.num_steps - done, job.options.optimization.gradient_accumulation_steps
    expected_s = 0.0 if done else num_steps * passes_per_step * cost.seconds  # a resumed run does not decide anew
    cost = compiled_if_it_pays(job, base, optimizer_step, largest, cost, expected_s, was_compiled, events)
    step_s = cost.seconds * passes_per_step
    needed = room_needed(job, optimizer_step, job.buckets[largest[0]])
    free = check_disk(folder, needed)
    fallback = optimizer_step.fallback
    is_checkpointed = job.options.machine.gradient_checkpointing is True or fallback.checkpointing_level > 0
    which = "partial " if fallback.checkpointing_level and not fallback.checkpoints_all else ""
    savings = [
        *([f"{which}gradient checkpointing"] if is_checkpointed else []),
        *([f"{counted(fallback.micro_batch, 'image')} per pass"] if fallback.micro_batch else []),
        *([f"base in {base.bits} bits"] if base.bits < 16 else []),
    ]
    events.emit(
        "measured", seconds=round(cost.seconds, 4), memory_mb=cost.memory_mb, expected_s=round(num_steps * step_s),
        gradient_checkpointing=is_checkpointed, micro_batch=fallback.micro_batch, bits=base.bits, disk_bytes=needed,
        text=f"  a step takes {step_s:.2f} s and {cost.memory_mb:,} of {total_memory_mb(device):,} MB"
        f"{''.join(f', {saving}' for saving in savings)}: {num_steps} steps in about {duration(num_steps * step_s)} "
        f"without previews; disk: up to {format_bytes(needed)} of {format_bytes(free)} free",
    )  # fmt: skip


def measured_step(job: Job, optimizer_step: OptimizerStep, batch: Sequence[int]) -> StepCost:
    """The cost of a pass over a batch. Raises `TooLarge` (69) if none fits into memory."""
    trials = count()

    def trial() -> None:
        """Use other random numbers from the second trial on: they verify the pass that was recorded on a CPU."""
        step = min(next(trials), 1)
        optimizer_step.trial(similar_batch(batch, job, step), step)

    def need_less() -> bool:
        nonlocal trials
        trials = count()
        return optimizer_step.fallback.need_less(len(batch))

    cure = f"{counted(len(batch), 'image')} of {job.buckets[batch[0]]} in one pass; lower --batch-size or --resolution"
    return measure(trial, job.accelerator.device, need_less, cure)


def compiled_if_it_pays(
    job: Job,
    base: Base,
    optimizer_step: OptimizerStep,
    batch: Sequence[int],
    cost: StepCost,
    expected_s: float,
    was_compiled: bool,
    events: Events,
) -> StepCost:
    """Compile the UNet's blocks if asked to, or on CUDA if the run is long enough and a step gets faster."""
    wanted, device, passes = job.options.machine.torch_compile, job.accelerator.device, optimizer_step.passes
    is_long = device.type == "cuda" and expected_s > MIN_RUN_S
    if not (wanted == "on" or (wanted == "auto" and is_long) or (was_compiled and wanted != "off")):
        return cost
    passes.forget()
    compiled_s = compile_blocks(
        base.unet, lambda: timed(lambda: optimizer_step.trial(batch), device), cost.seconds,
        force=wanted == "on" or was_compiled, report=lambda line: events.emit("note", text=f"  {line}"),
    )  # fmt: skip
    passes.set_compiled(compiled_s is not None)
    return replace(cost, seconds=compiled_s or cost.seconds)


def room_needed(job: Job, optimizer_step: OptimizerStep, size: Size) -> int:
    """Bytes on the disk that the run may need: previews of `size`, checkpoints and states."""
    options, plan = job.options, job.plan
    num_saves = plan.num_steps // plan.save_every if plan.save_every else 0
    num_previews = plan.num_steps // plan.preview_every + 2 if plan.preview_every else 0
    pixels = sum((prompt.width or size.width) * (prompt.height or size.height) for prompt in job.preview_prompts)
    num_parameters = sum(parameter.numel() for parameter in optimizer_step.named.values())
    return disk_needed(
        num_parameters, DTYPES[options.output.save_precision].itemsize, num_saves, options.output.keep_checkpoints,
        options.output.keep_count, bool(options.optimization.ema_decay), num_previews * pixels,
    )  # fmt: skip


def similar_batch(batch: Sequence[int], job: Job, epoch: int) -> Sequence[int]:
    """A batch of an epoch with the same number of images, size and use of masks; of other examples if possible."""

    def shape(one: Sequence[int]) -> tuple[object, ...]:
        return len(one), job.buckets[one[0]], any(job.masks[index] for index in one)

    batches = epoch_batches(job.buckets, job.repeats, job.plan.batch_size, seed=0, epoch=epoch)
    return next((one for one in batches if shape(one) == shape(batch)), batch)


def largest_batch(buckets: Sequence[Size], repeats: Sequence[int], batch_size: int) -> list[int]:
    """Example indices of the batch that needs the most memory: most pixels in all."""
    batches = epoch_batches(buckets, repeats, batch_size, seed=0, epoch=0)
    return max(batches, key=lambda one: len(one) * buckets[one[0]].width * buckets[one[0]].height)
