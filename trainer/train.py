"""The recipe: options in, adapter out, events on the way. Read it from top to bottom."""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from scumble.configs import files
from scumble.configs.errors import Refused
from scumble.configs.exit_codes import RESUMABLE, UNAVAILABLE
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
from .run.slowdown import SlowdownWatch
from .run.state import LoadedState, State, newest_state
from .system.device import device_may_fail
from .system.out_of_memory import TooLarge, unless_too_large
from .system.signals import Interrupted, Interrupts
from .training.checkpointing import recompute_activations
from .training.flat_parameters import Flat
from .training.forward_backward import Passes
from .training.lora import ADAPTER, AdaptedLayer, attach, component_of, memory_order, num_parameters
from .training.lr_schedules import lr_multiplier
from .training.objective import Objectives, Sample
from .training.optimizer_step import STOPPED_AFTER, Update, samples_of
from .training.optimizers import grouped, make_optimizer
from .training.validation import Validation


@dataclass(frozen=True)
class Ready:
    """What a job needs, loaded and tried."""

    base: Base
    trained: list[AdaptedLayer]
    update: Update
    validation: Validation | None


@dataclass(frozen=True)
class Result:
    """Where a run left its adapter, and its exit code: 0, or that of the signal or request that stopped it."""

    adapter: Path
    code: int


def train(
    options: Options,
    readers: list[Reader],
    *,
    go_on: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    measured: bool = False,
) -> Result | None:
    """Train an adapter as `options` say, in a new run folder or, bit for bit as if unbroken, in the old one `go_on`.

    `dry_run` stops after the plan, `measured` with it after a measured step. `force` goes on with another base or other
    pictures. Raises `Refused` for what a person can mend, before anything slow starts.
    """
    job = prepare_job(options, goes_on=go_on is not None)
    folder, device = (
        go_on or Path(job.options.output.output_dir) / job.options.output.output_name,
        job.accelerator.device,
    )
    if dry_run:
        events = Events(readers)
        emit_plan(job, events)
        if measured:
            with device_may_fail(device), own_stream(device):
                ready = make_ready(job, events)
                try_out(job, ready.base, ready.update, folder, events)
        return None
    notes: list[str] = []
    identity = identity_of(job.source, job.options, job.examples, job.crops)
    kept = newest_state(folder, notes.append)
    if kept and kept.state.step >= job.plan.num_steps and status_of(folder).state == "done":
        Events(readers).emit("note", text=f"{folder} is finished; more --epochs or --steps than it has go on with it")
        return Result(folder / f"{job.options.output.output_name}.safetensors", 0)
    if kept:
        notes += changes(kept.state, identity, force)
        notes += describe_schedule_change(kept.state, job.plan, job.options.optimization)
    try:
        with (
            Interrupts() as interrupts,
            RunFolder(folder).claim(force) as run,
            device_may_fail(device),
            own_stream(device),
        ):
            run.beat(kept.state.step if kept else 0, job.plan.num_steps)
            write_text(folder / OPTIONS, files.dumps(job.options))
            events = Events([*readers, file_reader(folder / EVENTS)])
            emit_plan(job, events, notes)
            ready = make_ready(job, events, kept)
            state = replace(kept.state if kept else State(started=time.time()), identity=identity)
            try_out(job, ready.base, ready.update, folder, events, state.step, state.compiled)
            return learn(job, ready, state, run, interrupts, events)
    except Interrupted as cut:
        raise Refused(f"stopped by {cut.by}; `scumble train {folder}` goes on", cut.code) from None
    except Refused as error:
        if isinstance(error, TakenOver) or error.exit_code not in (73, RESUMABLE) or not is_run(folder):
            raise
        raise Refused(f"{error}; then `scumble train {folder}` goes on", error.exit_code) from None


def make_ready(job: Job, events: Events, kept: LoadedState | None = None) -> Ready:
    """Load the base, encode the pictures, put the adapter on; where a run goes on, as its state `kept` tells."""

    def say(line: str) -> None:
        events.emit("note", text=f"  {line}")

    # 1. The base, every picture and caption encoded once, and the adapter.
    options, plan, wanted, device = job.options, job.plan, job.options.optimization, job.accelerator.device
    base = unless_too_large(partial(load_offloaded, options.model, job.source, device, job.dtype))
    if base is None:
        raise TooLarge(f"{job.source.label} does not fit into the memory of this machine", UNAVAILABLE)
    cache = None if options.data.latent_cache == "off" else cache_in(options.data.latent_cache)
    with on_device(base, base.vae):
        latents = encode_set(
            base, [(view.example.image, view.crops) for view in job.cropped],
            tell=lambda done: events.emit("encoded", done=done, total=len(job.cropped)), cache=cache,
            say=say, digests={example.image: example.digest for example in job.examples},
        )  # fmt: skip
    objectives = Objectives(
        base, job.examples, job.crops, latents, options.data, options.objective, options.output.seed,
        text_is_trained=len(plan.parts) > 1, masks=job.masks,
    )  # fmt: skip
    can_wait = offload_device(device) != device and not objectives.text_is_trained
    if not (can_wait and objectives.encode_ahead(samples_of_run(job))):
        fetch(base, *base.text_encoders)
    place_unet_that_fits(job, base, kept.state.bits if kept else 16, say)
    trained = attach(base, options.network, plan.parts, options.output.seed)
    largest = max(job.buckets, key=lambda size: size.width * size.height)
    choose_kernels(base.unet, options.machine.attention, largest, job.source.latent_px, say=say)
    count = num_parameters(trained)
    say(f"{count:,} trainable parameters in {len(trained)} layers, {count / base.num_weights:.2%} of the base")

    # 2. What is optimised, and how; then as the state that is gone on from.
    rated = [
        (plan.learning_rates[part.name], memory_order(module for module in trained if module.part == part.name))
        for part in plan.parts
    ]
    named = {f"{module.key}.{slot}": p for module in trained for slot, p in module.tensors.items()}
    groups = grouped(rated, [module.tensors["dora_scale"] for module in trained if "dora_scale" in module.tensors])
    flat = Flat([group["params"] for group in groups], job.dtype)
    all_fast = use_fast_lora([module.layer for module in trained], ADAPTER, flat.lowered)
    runs = (plan.num_steps - (kept.state.step if kept else 0)) * wanted.gradient_accumulation_steps
    passes = Passes(
        objectives, flat, job.accelerator.backward, nullcontext if all_fast else job.accelerator.autocast,
        capture_for(device, flat.gradients, [*flat.low, *flat.values], runs), say,
    )  # fmt: skip
    update = Update(
        job.accelerator, passes, named, flat, make_optimizer(wanted.optimizer, groups, wanted.weight_decay, flat),
        wanted.max_grad_norm, wanted.ema_decay, say, looks_per_step=sum(job.repeats) / plan.steps_per_epoch,
    )  # fmt: skip
    for part in plan.parts:
        component_of(base, part.name).train()
    if options.machine.gradient_checkpointing is True:
        recompute_activations(base, plan.parts)
    elif options.machine.gradient_checkpointing == "auto":
        update.recompute = [
            partial(recompute_activations, base, plan.parts, only_shallow=shallow) for shallow in (True, False)
        ]
    if options.machine.base_quantization == "auto":
        update.quantize = lambda: take_fewer_bits(base, options.model)
    if kept:
        update.restore(kept.tensors, kept.optimizer)
        update.rate_factor, update.broken_in_a_row = kept.state.lr_factor, kept.state.non_finite_in_a_row
        update.micro_batch = kept.state.micro_batch
        for _ in range(min(kept.state.checkpointing_level, len(update.recompute))):
            update.recompute_next()

    validation = None
    if job.held_out:
        validation = Validation(objectives, job.held_out, job.buckets, plan.batch_size, passes.surroundings)
    return Ready(base, trained, update, validation)


def place_unet_that_fits(job: Job, base: Base, bits: int, say: Callable[[str], None]) -> None:
    """The UNet onto the device, with quantize = auto in `bits` bits or as many fewer as fit.

    Raises `Refused` (69) where none do.
    """
    options, device = job.options, base.device
    is_free = options.machine.base_quantization == "auto"
    bits = bits if is_free else BITS[options.machine.base_quantization]
    while unless_too_large(partial(place_unet, base, options.model, bits)) is None:
        bits = fewer_bits(bits, device.type) if is_free else 0
        if not bits:
            raise TooLarge(f"{job.source.label} does not fit into the memory of the {device.type} device", UNAVAILABLE)
        say(f"out of memory: the base has {bits} bits (slower, a little less exact)")


def samples_of_run(job: Job) -> Iterator[Sample]:
    """Every look of the run, in order."""
    options, plan = job.options, job.plan
    steps = steps_of(
        plan.num_steps,
        job.buckets,
        job.repeats,
        plan.batch_size,
        options.optimization.gradient_accumulation_steps,
        options.output.seed,
    )
    for step, _, batches in steps:
        yield from samples_of(step, [index for batch in batches for index in batch])


def learn(job: Job, ready: Ready, state: State, run: RunFolder, interrupts: Interrupts, events: Events) -> Result:
    """The loop, from the state's step to the last: one update a step; previews and files on the way.

    A CUDA device may be a step ahead of what is told, but not where it pauses for something else.
    """
    plan, wanted, seed, update = job.plan, job.options.optimization, job.options.output.seed, ready.update
    artifacts = Artifacts(job, ready.base, ready.trained, update, ready.validation, state, run, events)
    pace, trouble = SlowdownWatch(job.accelerator.device), ""
    done, proven, is_whole = state.step, state.step, True
    interrupts.is_deferred = True
    if done:
        events.emit("resumed", step=done, text=f"  goes on after step {done}")
    artifacts.before(done)
    clock = time.monotonic()
    steps = steps_of(
        plan.num_steps + 1, job.buckets, job.repeats, plan.batch_size, wanted.gradient_accumulation_steps, seed
    )
    for (step, _, batches), (_, _, after) in pairwise(steps):
        if step < done:
            continue
        share = lr_multiplier(wanted.lr_scheduler, step, plan.num_steps, wanted.lr_warmup_steps, wanted.lr_num_cycles)
        update.take(step, batches, share, after[0])
        pauses = artifacts.is_due(step + 1) or run.is_asked or bool(interrupts)
        for outcome in update.outcomes(of_all=pauses):
            if outcome.non_finite and update.is_hopeless:
                trouble = (
                    f"step {outcome.step + 1}: the {outcome.non_finite} is not finite, as in the {STOPPED_AFTER - 1} "
                )
                trouble += "steps before; try a lower --learning-rate, or --mixed-precision fp32"
                break
            done, is_whole = outcome.step + 1, not outcome.non_finite
            if is_whole:
                proven = outcome.step  # its loss was that of the weights after so many steps
            seconds, clock = time.monotonic() - clock, time.monotonic()
            artifacts.tell(outcome, seconds)
            if slow := pace.add(seconds):
                events.emit("note", text=f"  {slow}")
        if trouble:
            break
        if update.taken:
            continue
        asked = run.requests()
        artifacts.after(done, asked, is_whole)
        if interrupts or "stop" in asked:
            run.stopped(interrupts.code or RESUMABLE, f"stopped {f'by {interrupts.by}' if interrupts else 'as asked'}")
            break
        clock = time.monotonic()
    if trouble and (good := newest_state(run.path, lambda line: None, before=proven + 1)):
        update.restore(good.tensors, good.optimizer)
        done, artifacts.losses = good.state.step, good.state.losses
    artifacts.finish(done, with_state=not trouble)
    if trouble:
        raise Refused(f"{trouble} (what was learned until step {done} is in {artifacts.path})")
    return Result(artifacts.path, run.code)


def changes(state: State, identity: dict[str, Any], force: bool) -> list[str]:
    """What a run that goes on will do otherwise than before. Raises `Refused` for what it cannot, or not unasked."""
    before = state.identity
    if refused := refused_changes(before, identity):
        raise Refused(f"{refused[0]}, and cannot change on its way; start a new run for it")
    doubtful = doubtful_changes(before, identity)
    if doubtful and not force:
        more = f" (and {len(doubtful) - 1} more)" if len(doubtful) > 1 else ""
        raise Refused(f"since the run began, {doubtful[0]}{more}; put it back, or --force goes on all the same")
    return [f"changed: {line}" for line in [*doubtful, *allowed_changes(before, identity)]]


def describe_schedule_change(state: State, plan: Plan, wanted: Optimization) -> list[str]:
    """What another number of steps does to the rate of a run that goes on after its state: a line, or none."""
    before = state.identity["options"]["optimization"]
    if before["steps"] == plan.num_steps or plan.lr_scheduler == "constant":
        return []
    old = lr_multiplier(
        before["lr_scheduler"], state.step - 1, before["steps"], before["lr_warmup_steps"], before["lr_num_cycles"]
    )
    new = lr_multiplier(plan.lr_scheduler, state.step, plan.num_steps, wanted.lr_warmup_steps, wanted.lr_num_cycles)
    return [
        f"the {plan.lr_scheduler} schedule now spans {plan.num_steps} steps: the learning rate changes from {old:.1%} to "
        f"{new:.1%} of its peak"
    ]


def steps_of(
    num_steps: int, buckets: Sequence[Hashable], repeats: Sequence[int], batch: int, accumulate: int, seed: int
) -> Iterator[tuple[int, int, list[list[int]]]]:
    """(step, epoch, batches of example indices) for every step; the last step of an epoch may have fewer batches."""
    step = epoch = 0
    while True:
        batches = epoch_batches(buckets, repeats, batch, seed, epoch)
        for start in range(0, len(batches), accumulate):
            if step == num_steps:
                return
            yield step, epoch, batches[start : start + accumulate]
            step += 1
        epoch += 1
