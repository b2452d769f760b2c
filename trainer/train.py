"""The recipe: options in, adapter out, events on the way. Read it from top to bottom."""

import math
import time
from collections.abc import Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.optimizer import AcceleratedOptimizer

from scumble.configs import files
from scumble.configs.errors import Refused
from scumble.configs.options import Options
from scumble.datasets.buckets import bucket_sizes, nearest_bucket
from scumble.datasets.captions import with_trigger
from scumble.datasets.folder import PictureSet, read_set
from scumble.datasets.images import Size, centre_crop, read_size
from scumble.datasets.order import batches_per_epoch, epoch_batches

from .events import Events, Reader, file_reader
from .export import Progress, export, metadata_of
from .latents import encode_set
from .lora import attach, component_of, num_parameters, recompute_activations
from .machine import DTYPES, InterruptFlag, check_attention, make_accelerator, memory_mb
from .memory import duration, measure
from .models import load, recognise
from .optimizers import check_optimizer, make_optimizer, set_rate
from .plan import batch_of, make_plan, resolution_of, settled
from .preview import Gallery, default_cfg, write_picture
from .prompts import shots_of
from .report import loss_curve
from .schedules import rate_share
from .step import Look, Objectives, seed_for


@dataclass(frozen=True)
class Result:
    """Where a run left its adapter, and whether it was stopped before its end."""

    adapter: Path
    stopped: bool


def train(options: Options, readers: list[Reader], dry_run: bool = False) -> Result | None:
    """Train an adapter as `options` say. Raises `Refused` for what a person can mend, before anything slow starts."""
    # 1. Look at everything that can be wrong: base, pictures, optimiser, prompts.
    source = recognise(options.model)
    check_optimizer(options.optimization.optimizer)
    check_attention(options.machine.attention)
    found = read_examples(options)
    examples = found.examples
    resolution_px = resolution_of(options, source)
    sizes = bucket_sizes(resolution_px, source.step_px)
    originals = [read_size(example.image) for example in examples]
    crops = [centre_crop(size, nearest_bucket(size, sizes)) for size in originals]
    captions = [example.caption for example in examples if not example.prior]
    shots = shots_of(options.previews, resolution_px, captions, default_cfg(source.name))

    # 2. Plan: every "auto" becomes a number with its reason; what will really be used is written down.
    buckets, repeats = [crop.target for crop in crops], [example.repeats for example in examples]
    per_epoch = batches_per_epoch(buckets, repeats, batch_of(options, source))
    plan = make_plan(options, source, per_epoch, len(captions), sum(repeats))
    folder, name = run_folder(options)
    options = settled(options, plan, name)
    wanted = options.optimization
    accelerator, dtype = make_accelerator(options.machine)
    device = accelerator.device
    if not dry_run:
        make_folder(folder)
    events = Events(readers if dry_run else [*readers, file_reader(folder / "events.jsonl")])
    shapes = ", ".join(map(str, dict.fromkeys(buckets)))
    counted = f"{len(captions)} pictures in {len(set(buckets))} bucket{'s' * (len(set(buckets)) > 1)} ({shapes})"
    why = [f"{counted} for {source.label}, {str(dtype).removeprefix('torch.')} on {device}", *plan.reasons]
    if source.name == "sketch":
        why.append("sketch is the embedded base, for demonstration and tests; name a real one with --base")
    events.emit("plan", name=name, steps=plan.num_steps, epochs=plan.num_epochs, why=why, shots=len(shots))
    events.emit("pictures", left_out=list(map(str, found.left_out)), remarks=list(map(str, found.remarks)),
                text=found.told())  # fmt: skip
    if dry_run:
        return None
    (folder / "options.toml").write_text(files.dumps(options), encoding="utf-8")

    # 3. Load the base, encode every picture once, put the adapter on.
    base = load(options.model, source, device, dtype)
    latents = encode_set(
        base, [(e.image, c) for e, c in zip(examples, crops, strict=True)], options.data.flip,
        tell=lambda done: events.emit("encoded", done=done, total=len(examples)),
    )  # fmt: skip
    trained = attach(base, options.network, plan.parts, options.output.seed)
    if options.machine.attention == "xformers":
        base.unet.enable_xformers_memory_efficient_attention()
    weights = sum(p.numel() for module in (base.unet, *base.text_encoders) for p in module.parameters())
    count = num_parameters(trained)
    share = count / (weights - count)
    events.emit("note", text=f"  {count:,} trainable parameters in {len(trained)} layers, {share:.2%} of the base")

    # 4. What is optimised, and how.
    groups = [
        (plan.rates[part.name], [p for module in trained if module.part == part.name for p in module.tensors.values()])
        for part in plan.parts
    ]
    parameters = [parameter for _, group in groups for parameter in group]
    magnitudes = [module.tensors["dora_scale"] for module in trained if "dora_scale" in module.tensors]
    # accelerate unscales gradients in fp16
    optimizer = accelerator.prepare(make_optimizer(wanted.optimizer, groups, wanted.weight_decay, magnitudes))
    objectives = Objectives(
        base, examples, crops, latents, options.data, options.objective, options.output.seed,
        text_is_trained=len(plan.parts) > 1,
    )  # fmt: skip
    average = [parameter.detach().clone() for parameter in parameters] if wanted.ema else []
    started, losses = time.time(), []
    gallery = Gallery(base, shots, options.previews.sampler, folder / "previews", events)

    def preview(epoch: int, step: int) -> None:
        label = f"epoch {epoch}" if step == epoch * plan.steps_per_epoch else f"step {step}"
        with finished_weights(optimizer, parameters, average):
            gallery.add(label if step else "before", epoch, step)

    def save(path: Path, epoch: int, step: int) -> None:
        progress = Progress(epoch, step, plan.num_epochs, plan.num_steps, started)
        metadata = metadata_of(base, options, plan.parts, examples, buckets, progress)
        with finished_weights(optimizer, parameters, average):
            export(path, trained, metadata, DTYPES[options.output.save_dtype])
        events.emit("saved", step=step, epoch=epoch, file=path.name, bytes=path.stat().st_size)

    # 5. One pass of the largest batch, measured: does it fit, and how long will the run take?
    for part in plan.parts:
        component_of(base, part.name).train()
    largest = largest_batch(buckets, repeats, plan.batch)

    def trial() -> None:
        with accelerator.autocast():
            loss = objectives.losses([Look(index, 0, slot) for slot, index in enumerate(largest)]).mean()
        accelerator.backward(loss)
        optimizer.zero_grad(set_to_none=True)

    measured = measure(
        trial, device, options.machine.checkpointing, lambda: recompute_activations(base, plan.parts),
        cure=f"{len(largest)} pictures of {buckets[largest[0]]} at once; lower --batch or --resolution",
    )  # fmt: skip
    expected_s = plan.num_steps * wanted.accumulate * measured.seconds
    events.emit(
        "measured", seconds=round(measured.seconds, 4), memory_mb=measured.memory_mb, expected_s=round(expected_s),
        checkpointing=measured.checkpointing,
        text=f"  a step takes {measured.seconds * wanted.accumulate:.2f} s and {measured.memory_mb:,} MB"
        + (", activations recomputed" if measured.checkpointing else "")
        + f": {plan.num_steps} steps in about {duration(expected_s)} without previews",
    )  # fmt: skip

    # 6. The loop: looks at pictures, one update a step; previews and files on the way.
    interrupted, trouble = InterruptFlag(), ""
    epoch = done = 0
    if plan.preview_every:
        preview(0, 0)
    trained_s = 0.0
    for step, epoch, batches in steps_of(
        plan.num_steps, buckets, repeats, plan.batch, wanted.accumulate, options.output.seed
    ):
        clock = time.monotonic()
        torch.manual_seed(seed_for(options.output.seed, step, "dropout"))
        set_rate(optimizer, rate_share(wanted.schedule, step, plan.num_steps, wanted.warm_up, wanted.restarts))
        num_looks = sum(map(len, batches))
        total, slot = torch.zeros((), device=device), 0
        for batch in batches:
            looks = [Look(index, step, slot + position) for position, index in enumerate(batch)]
            slot += len(batch)
            with accelerator.autocast():
                loss = objectives.losses(looks).sum() / num_looks
            accelerator.backward(loss)
            total += loss.detach()
        norm = accelerator.clip_grad_norm_(parameters, wanted.clip or math.inf)
        scaled = accelerator.scaler is not None  # fp16: the scaler leaves out a step whose gradient overflows
        broken = "" if torch.isfinite(total) else "loss"
        if broken or not (scaled or torch.isfinite(norm)):
            trouble = f"step {step + 1}: the {broken or 'gradient'} is not finite"
            trouble += "; try a lower --rate, or --precision fp32"
            break
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for mean, parameter in zip(average, parameters, strict=False):
            mean.lerp_(parameter.detach(), 1 - wanted.ema)
        losses.append(float(total))
        done, trained_s = step + 1, trained_s + time.monotonic() - clock
        events.emit(
            "step", step=done, epoch=epoch + 1, loss=losses[-1], rate=optimizer.param_groups[0]["lr"],
            num_steps=plan.num_steps, steps_per_s=round(done / trained_s, 3),
            memory_mb=memory_mb(device),
        )  # fmt: skip
        if plan.save_every and done % plan.save_every == 0 and done < plan.num_steps:
            save(folder / "checkpoints" / f"{name}-{done:06}.safetensors", epoch + 1, done)
        if plan.preview_every and (done % plan.preview_every == 0 or done == plan.num_steps):
            preview(epoch + 1, done)
        if interrupted:
            break
    interrupted.close()

    # 7. The result: the adapter, read back and compared; its cover; the loss as a curve.
    path = folder / f"{name}.safetensors"
    save(path, epoch + 1, done)
    if gallery.cover:
        write_picture(gallery.cover, folder / f"{name}.png")
    if losses:
        write_picture(loss_curve(losses, f"{name}: loss"), folder / "loss.png")
    size_mb = path.stat().st_size / 1e6
    stopped = done < plan.num_steps
    text = f"adapter {path} ({size_mb:.1f} MB), previews {folder / 'previews'}"
    if stopped:
        again = f"scumble train {folder / 'options.toml'} starts it anew"
        text += f"\nstopped after step {done} of {plan.num_steps}; {again}"
    events.emit("done", step=done, epoch=epoch + 1, stopped=stopped, text=text)
    if trouble:
        raise Refused(f"{trouble} (what was learned before is in {path})")
    return Result(path, stopped)


def read_examples(options: Options) -> PictureSet:
    """The pictures, the trigger in their captions; regularisation pictures are repeated to be about as many."""
    if not options.data.images:
        raise Refused("train: name a folder of pictures, as in `scumble train photos/`")
    found = read_set(Path(options.data.images), options.data.repeats)
    if options.data.prior:
        found += read_set(Path(options.data.prior), prior=True)
    prior = sum(example.repeats for example in found.examples if example.prior)
    times = max(1, round(sum(example.repeats for example in found.examples if not example.prior) / max(1, prior)))
    found.examples = [
        replace(example, repeats=example.repeats * times)
        if example.prior
        else replace(
            example,
            caption=with_trigger(example.caption, options.data.trigger),
            lines=tuple(with_trigger(line, options.data.trigger) for line in example.lines),
        )
        for example in found.examples
    ]
    if all(example.prior for example in found.examples):
        raise Refused(f"{options.data.images}: every picture there is for regularisation, none is left to learn from")
    return found


def run_folder(options: Options) -> tuple[Path, str]:
    """A folder of its own for this run, `runs/NAME` or `runs/NAME-2` and so on, and that name."""
    wanted = options.output.name or Path(options.data.images).resolve().name
    name, number = wanted, 1
    while (Path(options.output.runs) / name).exists():
        number += 1
        name = f"{wanted}-{number}"
    return Path(options.output.runs) / name, name


def make_folder(folder: Path) -> None:
    """Raises `Refused` (73) where the run's folder cannot be made or written."""
    try:
        folder.mkdir(parents=True)
        (folder / "events.jsonl").touch()
    except OSError as error:
        raise Refused(f"--runs {folder.parent}: {folder} cannot be made ({error.strerror})", 73) from None


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


def largest_batch(buckets: Sequence[Size], repeats: Sequence[int], batch: int) -> list[int]:
    """Example indices of the batch that needs the most memory: most pixels in all."""
    batches = epoch_batches(buckets, repeats, batch, seed=0, epoch=0)
    return max(batches, key=lambda one: len(one) * buckets[one[0]].width * buckets[one[0]].height)


@contextmanager
def finished_weights(
    optimizer: AcceleratedOptimizer, parameters: Sequence[torch.nn.Parameter], average: Sequence[torch.Tensor]
) -> Generator[None]:
    """Within the block the parameters are those to look at and to keep: their moving average where one is kept.

    A schedule-free optimiser trains at another point than the one that it finds; its `eval` goes there, `train` back.
    """
    switches = hasattr(optimizer.optimizer, "eval")
    if switches:
        optimizer.eval()
    live = [parameter.detach().clone() for parameter in parameters] if average else []
    for parameter, mean in zip(parameters, average, strict=False):
        parameter.data.copy_(mean)
    try:
        yield
    finally:
        for parameter, value in zip(parameters, live, strict=False):
            parameter.data.copy_(value)
        if switches:
            optimizer.train()
