"""What a run will do, looked at and planned before a weight is loaded."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from scumble.configs.errors import Refused
from scumble.configs.options import Options
from scumble.datasets.captions import with_trigger
from scumble.datasets.folder import Example, PictureSet, read_set
from scumble.datasets.images import Crop, Size
from scumble.datasets.order import batches_per_epoch, told_batches
from scumble.datasets.views import View, tables, views_of, weights_of
from scumble.datasets.waste import bucket_uses, told_waste

from .events import Events
from .machine import check_attention, make_accelerator
from .models import Source, recognise
from .optimizers import check_optimizer
from .plan import Plan, batch_of, make_plan, resolution_of, settled
from .preview import default_cfg
from .prompts import Shot, shots_of
from .run_folder import name_of_set


@dataclass(frozen=True)
class Job:
    """What a run will do, decided before a weight is loaded; in `options` every "auto" is settled."""

    options: Options
    source: Source
    pictures: PictureSet
    views: list[View]
    masks: list[tuple[torch.Tensor, ...]]
    shots: list[Shot]
    plan: Plan
    accelerator: Accelerator
    dtype: torch.dtype

    @property
    def examples(self) -> list[Example]:
        return [view.example for view in self.views]

    @property
    def crops(self) -> list[tuple[Crop, ...]]:
        return [view.crops for view in self.views]

    @property
    def buckets(self) -> list[Size]:
        return [view.size for view in self.views]

    @property
    def repeats(self) -> list[int]:
        return [example.repeats for example in self.examples]


def look(options: Options) -> Job:
    """Everything that can be wrong is looked at: base, pictures, optimiser, prompts; every "auto" becomes a number."""
    source = recognise(options.model)
    check_optimizer(options.optimization.optimizer)
    check_attention(options.machine.attention)
    found = read_examples(options)
    resolution_px = resolution_of(options, source)
    step_px = source.step_px if options.data.bucket_step == "auto" else options.data.bucket_step
    if step_px % source.whole_px:
        raise Refused(f"--bucket-step {step_px}: must be a multiple of {source.whole_px} for {source.label}")
    views = views_of(found.examples, tables(options.data, resolution_px, step_px), options.data, options.output.seed)
    masks = [weights_of(view, source.latent_px, options.data.mask_floor) for view in views]
    captions = [example.caption for example in found.examples if not example.prior]
    shots = shots_of(options.previews, resolution_px, captions, default_cfg(source.name))
    buckets, repeats = [view.size for view in views], [view.example.repeats for view in views]
    per_epoch = batches_per_epoch(buckets, repeats, batch_of(options, source))
    plan = make_plan(options, source, per_epoch, len(captions), sum(repeats))
    name = options.output.name or free_folder(options).name
    accelerator, dtype = make_accelerator(options.machine)
    return Job(settled(options, plan, name), source, found, views, masks, shots, plan, accelerator, dtype)


def announce(job: Job, events: Events, notes: Sequence[str] = ()) -> None:
    """What was found and decided, with the reasons."""
    sizes = list(dict.fromkeys(job.buckets))
    count = sum(not example.prior for example in job.pictures.examples)
    found = f"{count} pictures in {f'{len(sizes)} buckets' if len(sizes) > 1 else f'1 bucket ({sizes[0]})'}"
    device, dtype = job.accelerator.device, str(job.dtype).removeprefix("torch.")
    why = [*notes, f"{found} for {job.source.label}, {dtype} on {device}", *job.plan.reasons]
    if job.source.name == "sketch":
        why.append("sketch is the embedded base, for demonstration and tests; name a real one with --base")
    events.emit(
        "plan", name=job.options.output.name, steps=job.plan.num_steps, epochs=job.plan.num_epochs, why=why,
        shots=len(job.shots),
    )  # fmt: skip
    told = [told_waste(job.views), told_batches(job.buckets, job.repeats, job.plan.batch), job.pictures.told()]
    events.emit(
        "pictures", left_out=list(map(str, job.pictures.left_out)), remarks=list(map(str, job.pictures.remarks)),
        buckets=[asdict(use) for use in bucket_uses(job.views)],
        text="\n".join(filter(None, told)),
    )  # fmt: skip


def read_examples(options: Options) -> PictureSet:
    """The pictures, the trigger in their captions; regularisation pictures are repeated to be about as many."""
    if not options.data.images:
        raise Refused("train: name a folder of pictures, as in `scumble train photos/`")
    found = read_set(Path(options.data.images), options.data.repeats, masks=options.data.masks)
    if options.data.prior:
        found += read_set(Path(options.data.prior), prior=True, masks=options.data.masks)
    prior = sum(example.repeats for example in found.examples if example.prior)
    times = max(1, round(sum(example.repeats for example in found.examples if not example.prior) / max(1, prior)))
    found.examples = [
        replace(example, repeats=example.repeats * times)
        if example.prior
        else replace(example, caption=with_trigger(example.caption, options.data.trigger))
        for example in found.examples
    ]
    if all(example.prior for example in found.examples):
        raise Refused(f"{options.data.images}: every picture there is for regularisation, none is left to learn from")
    return found


def free_folder(options: Options) -> Path:
    """A folder that is not there yet: `runs/NAME`, `runs/NAME-2` and so on."""
    wanted = options.output.name or name_of_set(options.data.images)
    folder, number = Path(options.output.runs) / wanted, 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{wanted}-{number}")
    return folder
