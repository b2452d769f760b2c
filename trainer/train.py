"""The recipe: options in, adapter out, events on the way. Read it from top to bottom."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from scumble.configs import files
from scumble.configs.errors import Refused
from scumble.configs.exit_codes import CANNOT_WRITE, DONE, RESUMABLE, UNAVAILABLE
from scumble.configs.options import Optimization, Options
from scumble.datasets.batches import epoch_batches
from scumble.datasets.cache import cache_in

from .artifacts import Artifacts
from .base_model.latents import encode_set
from .base_model.load import Base, load_offloaded, offload_device, place_unet, take_fewer_bits
from .base_model.offload import fetch, on_device
from .base_model.quantize import BITS, fewer_bits
from .kernels.attention import choose_kernels
from .kernels.capture import capture_for
from .kernels.cuda_graphs import own_stream
from .kernels.lora_matmul import use_fast_lora
from .plan.job import Job, emit_plan, prepare_job
from .plan.plan import Plan
from .preflight import try_out
from .run.events import Events, Reader, file_reader
from .run.fingerprint import allowed_changes, doubtful_changes, identity_of, refused_changes
from .run.folder import EVENTS, OPTIONS, RunFolder, TakenOver, is_run, status_of, write_text
from .run.state import LoadedState, State, newest_state
from .system.device import device_may_fail
from .system.out_of_memory import TooLarge, unless_too_large
from .system.signals import Interrupted, Interrupts
from .training.checkpointing import enable_gradient_checkpointing
from .training.flat_parameters import FlatParameters
from .training.forward_backward import Passes
from .training.lora import ADAPTER, AdaptedLayer, attach, component_of, memory_order, num_parameters
from .training.lr_schedules import lr_multiplier
from .training.memory_fallback import MemoryFallback
from .training.objective import Objectives, Sample
from .training.optimizer_step import STOPPED_AFTER, OptimizerStep, samples_of
from .training.optimizers import make_optimizer, param_groups
from .training.validation import Validation


@dataclass(frozen=True)
class Prepared:
    """Everything that the training loop needs."""

    base: Base
    adapter: list[AdaptedLayer]
    optimizer_step: OptimizerStep
    validation: Validation | None


@dataclass(frozen=True)
class Result:
    """The file of the adapter, and the exit code: 0, or that of the signal or request that stopped the run."""

    adapter: Path
    code: int


def train(
    options: Options,
    readers: list[Reader],
    *,
    resume: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    measured: bool = False,
) -> Result | None:
    """Train an adapter as `options` say, in a new run folder or, bit for bit as if never interrupted, in `resume`.

    `dry_run` stops after the plan; with `measured`, after one measured step. `force` resumes with another base or other
    images. Raises `Refused` for what a person can fix, before anything slow starts.
    """
    job = prepare_job(options, is_resumed=resume is not None)
    folder = resume or Path(job.options.output.output_dir) / job.options.output.output_name
    device = job.accelerator.device
    if dry_run:
        events = Events(readers)
        emit_plan(job, events)
        if measured:
            with device_may_fail(device), own_stream(device):
                prepared = prepare(job, events)
                try_out(job, prepared.base, prepared.optimizer_step, folder, events)
        return None
    notes: list[str] = []
    identity = identity_of(job.source, job.options, job.examples, job.crops)
    loaded = newest_state(folder, notes.append)
    if loaded and loaded.state.step >= job.plan.num_steps and status_of(folder).state == "done":
        Events(readers).emit("note", text=f"{folder} is finished; to continue it, give more --epochs or --steps")
        return Result(folder / f"{job.options.output.output_name}.safetensors", DONE)
    if loaded:
        notes += changes(loaded.state, identity, force)
        notes += describe_schedule_change(loaded.state, job.plan, job.options.optimization)
    try:
        with (
            Interrupts() as interrupts,
            RunFolder(folder).claim(force) as run,
            device_may_fail(device),
            own_stream(device),
        ):
            run.beat(loaded.state.step if loaded else 0, job.plan.num_steps)
            write_text(folder / OPTIONS, files.dumps(job.options))
            events = Events([*readers, file_reader(folder / EVENTS)])
            emit_plan(job, events, notes)
            prepared = prepare(job, events, loaded)
            state = replace(loaded.state if loaded else State(started=time.time()), identity=identity)
            try_out(job, prepared.base, prepared.optimizer_step, folder, events, state.step, state.compiled)
            return learn(job, prepared, state, run, interrupts, events)
    except Interrupted as interrupted:
        raise Refused(f"stopped by {interrupted.by}; resume with `scumble train {folder}`", interrupted.code) from None
    except Refused as error:
        if isinstance(error, TakenOver) or error.exit_code not in (CANNOT_WRITE, RESUMABLE) or not is_run(folder):
            raise
        raise Refused(f"{error}; then resume with `scumble train {folder}`", error.exit_code) from None


def prepare(job: Job, events: Events, loaded: LoadedState | None = None) -> Prepared:
    """Load the base, encode images and captions, attach the adapter; for a resumed run, restore its `loaded` state."""

    def report(line: str) -> None:
        events.emit("note", text=f"  {line}")

    # 1. Load the base, and encode every image and caption once.
    options, plan, wanted, device = job.options, job.plan, job.options.optimization, job.accelerator.device
    base = unless_too_large(partial(load_offloaded, options.model, job.source, device, job.dtype))
    if base is None:
        raise TooLarge(f"{job.source.label} does not fit into the memory of this machine", UNAVAILABLE)
    cache = None if options.data.latent_cache == "off" else cache_in(options.data.latent_cache)
    with on_device(base, base.vae):
        latents = encode_set(
            base, [(one.example.image, one.crops) for one in job.cropped],
            progress=lambda done: events.emit("encoded", done=done, total=len(job.cropped)), cache=cache,
            report=report, digests={example.image: example.digest for example in job.examples},
        )  # fmt: skip
    objectives = Objectives(
        base, job.examples, job.crops, latents, options.data, options.objective, options.output.seed,
        text_is_trained=len(plan.parts) > 1, masks=job.masks,
    )  # fmt: skip
    can_wait = offload_device(device) != device and not objectives.text_is_trained
    if not (can_wait and objectives.encode_ahead(samples_of_run(job))):
        fetch(base, *base.text_encoders)
    place_unet_that_fits(job, base, loaded.state.bits if loaded else 16, report)

    # 2. Attach the adapter, and choose the kernels.
    adapter = attach(base, options.network, plan.parts, options.output.seed)
    largest = max(job.buckets, key=lambda size: size.width * size.height)
    choose_kernels(base.unet, options.machine.attention, largest, job.source.latent_px, report=report)
    count = num_parameters(adapter)
    report(f"{count:,} trainable parameters in {len(adapter)} layers, {count / base.num_weights:.2%} of the base")

    # 3. Lay all trained parameters out in one buffer, and make the optimizer.
    learning_rates = [
        (plan.learning_rates[part.name], memory_order(layer for layer in adapter if layer.part == part.name))
        for part in plan.parts
    ]
    named = {f"{layer.key}.{slot}": p for layer in adapter for slot, p in layer.tensors.items()}
    no_decay = [layer.tensors["dora_scale"] for layer in adapter if "dora_scale" in layer.tensors]
    groups = param_groups(learning_rates, no_decay)
    flat = FlatParameters([group["params"] for group in groups], job.dtype)
    optimizer = make_optimizer(wanted.optimizer, groups, wanted.weight_decay, flat)

    # 4. The forward and backward pass, and the optimizer step over it.
    all_fast = use_fast_lora([layer.layer for layer in adapter], ADAPTER, flat.lowered)
    num_passes = (plan.num_steps - (loaded.state.step if loaded else 0)) * wanted.gradient_accumulation_steps
    passes = Passes(
        objectives, flat, job.accelerator.backward, nullcontext if all_fast else job.accelerator.autocast,
        capture_for(device, flat.gradients, [*flat.low, *flat.values], num_passes), report,
    )  # fmt: skip
    for part in plan.parts:
        component_of(base, part.name).train()
    if options.machine.gradient_checkpointing is True:
        enable_gradient_checkpointing(base, plan.parts)
    state = loaded.state if loaded else State()
    fallback = MemoryFallback(
        passes, device, report,
        checkpointing=[
            partial(enable_gradient_checkpointing, base, plan.parts, only_shallow=shallow) for shallow in (True, False)
        ] if options.machine.gradient_checkpointing == "auto" else (),
        quantize=partial(take_fewer_bits, base, options.model) if options.machine.base_quantization == "auto" else None,
        micro_batch=state.micro_batch, checkpointing_level=state.checkpointing_level,
    )  # fmt: skip
    optimizer_step = OptimizerStep(
        job.accelerator, passes, named, flat, optimizer, wanted.max_grad_norm, wanted.ema_decay, fallback, report,
        samples_per_step=sum(job.repeats) / plan.steps_per_epoch, lr_factor=state.lr_factor,
        non_finite_in_a_row=state.non_finite_in_a_row,
    )  # fmt: skip
    if loaded:
        optimizer_step.restore(loaded.tensors, loaded.optimizer)

    validation = None
    if job.held_out:
        validation = Validation(objectives, job.held_out, job.buckets, plan.batch_size, passes.autocast)
    return Prepared(base, adapter, optimizer_step, validation)


def place_unet_that_fits(job: Job, base: Base, bits: int, report: Callable[[str], None]) -> None:
    """Move the UNet to the device; with base_quantization = auto in `bits` bits, or in as many fewer as fit.

    Raises `TooLarge` (69) if none fit.
    """
    options, device = job.options, base.device
    is_free = options.machine.base_quantization == "auto"
    bits = bits if is_free else BITS[options.machine.base_quantization]
    while unless_too_large(partial(place_unet, base, options.model, bits)) is None:
        bits = fewer_bits(bits, device.type) if is_free else 0
        if not bits:
            raise TooLarge(f"{job.source.label} does not fit into the memory of the {device.type} device", UNAVAILABLE)
        report(f"out of memory: the base is kept in {bits} bits (slower, slightly less exact)")


def learn(job: Job, prepared: Prepared, state: State, run: RunFolder, interrupts: Interrupts, events: Events) -> Result:
    """The training loop, from the step of `state` to the last, with previews, checkpoints and events.

    A CUDA device may be one step ahead of the outcomes that are read, except where the run pauses after a step.
    """
    plan, wanted, optimizer_step = job.plan, job.options.optimization, prepared.optimizer_step
    artifacts = Artifacts(job, prepared.base, prepared.adapter, optimizer_step, prepared.validation, state, run, events)
    trouble = ""
    interrupts.is_deferred = True
    if state.step:
        events.emit("resumed", step=state.step, text=f"  resumed after step {state.step}")
    artifacts.before(state.step)

    for (step, _, batches), (_, _, following) in pairwise(steps_of(job, plan.num_steps + 1)):
        if step < state.step:
            continue
        multiplier = lr_multiplier(
            wanted.lr_scheduler, step, plan.num_steps, wanted.lr_warmup_steps, wanted.lr_num_cycles
        )
        optimizer_step.take(step, batches, multiplier, following[0])
        pauses = artifacts.is_due(step + 1) or run.has_requests or bool(interrupts)
        for outcome in optimizer_step.outcomes(wait=pauses):
            if outcome.is_hopeless:
                trouble = (
                    f"step {outcome.step + 1}: the {outcome.non_finite} is not finite, as in the {STOPPED_AFTER - 1}"
                )
                trouble += " steps before; try a lower --learning-rate, or --mixed-precision fp32"
                break
            artifacts.record(outcome)
        if trouble:
            break
        if optimizer_step.queued:
            continue
        asked = run.requests()
        artifacts.after(asked)
        if interrupts or "stop" in asked:
            run.set_exit(interrupts.code or RESUMABLE, f"stopped {f'by {interrupts.by}' if interrupts else 'as asked'}")
            break

    if trouble and (good := newest_state(run.path, lambda line: None, before=artifacts.last_finite + 1)):
        optimizer_step.restore(good.tensors, good.optimizer)
        artifacts.done, artifacts.losses = good.state.step, good.state.losses
    artifacts.finish(with_state=not trouble)
    if trouble:
        raise Refused(f"{trouble} (the adapter as of step {artifacts.done} is in {artifacts.path})")
    return Result(artifacts.path, run.code)


def steps_of(job: Job, num_steps: int) -> Iterator[tuple[int, int, list[list[int]]]]:
    """(step, epoch, batches of example indices) of every step; the last step of an epoch may have fewer batches."""
    accumulation, seed = job.options.optimization.gradient_accumulation_steps, job.options.output.seed
    step = epoch = 0
    while True:
        batches = epoch_batches(job.buckets, job.repeats, job.plan.batch_size, seed, epoch)
        for start in range(0, len(batches), accumulation):
            if step == num_steps:
                return
            yield step, epoch, batches[start : start + accumulation]
            step += 1
        epoch += 1


def samples_of_run(job: Job) -> Iterator[Sample]:
    """Every training sample of the run, in order."""
    for step, _, batches in steps_of(job, job.plan.num_steps):
        yield from samples_of(step, [index for batch in batches for index in batch])


def changes(state: State, identity: dict[str, Any], force: bool) -> list[str]:
    """What a resumed run does differently. Raises `Refused` for what cannot change, or only with `force`."""
    before = state.identity
    if refused := refused_changes(before, identity):
        raise Refused(f"{refused[0]}, which cannot change within a run; start a new run for it")
    doubtful = doubtful_changes(before, identity)
    if doubtful and not force:
        more = f" (and {len(doubtful) - 1} more)" if len(doubtful) > 1 else ""
        raise Refused(f"since the run began, {doubtful[0]}{more}; undo that, or resume with --force")
    return [f"changed: {line}" for line in [*doubtful, *allowed_changes(before, identity)]]


def describe_schedule_change(state: State, plan: Plan, wanted: Optimization) -> list[str]:
    """A line on what another number of steps does to the learning rate of a resumed run, or none."""
    before = state.identity["options"]["optimization"]
    if before["steps"] == plan.num_steps or plan.lr_scheduler.startswith("constant"):
        return []
    old = lr_multiplier(
        before["lr_scheduler"], state.step - 1, before["steps"], before["lr_warmup_steps"], before["lr_num_cycles"]
    )
    new = lr_multiplier(plan.lr_scheduler, state.step, plan.num_steps, wanted.lr_warmup_steps, wanted.lr_num_cycles)
    line = (
        f"the {plan.lr_scheduler} schedule now spans {plan.num_steps} steps: the learning rate changes from {old:.1%} "
    )
    return [f"{line}to {new:.1%} of its peak"]
