"""What a run will do, looked at and planned before a weight is loaded."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from scumble.configs.options import Options
from scumble.datasets.batches import batches_per_epoch, told_batches
from scumble.datasets.crop_loss import bucket_uses, told_waste
from scumble.datasets.crops import View
from scumble.datasets.reading.folder import Example, PictureSet
from scumble.datasets.reading.images import Crop, Size
from scumble.datasets.tensors import masks_of

from ..base_model.detect import Source, recognise
from ..base_model.quantize import BITS, check_bits
from ..previews.prompts import Shot, default_cfg, derived, shots_of
from ..run.events import Events
from ..run.folder import name_of_set
from ..system.device import check_alone, check_attention, make_accelerator
from ..training.optimizers import check_optimizer
from .findings import as_json, told_findings
from .plan import Plan, batch_size_of, make_plan, settled
from .training_set import checked, heard, read_examples, read_views, resolution_of


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

    @property
    def held_out(self) -> list[int]:
        """Indices of the examples that are only measured."""
        return [index for index, example in enumerate(self.examples) if example.is_held_out]


def look(options: Options, goes_on: bool = False) -> Job:
    """Everything that can be wrong is looked at: base, pictures, optimiser, prompts; every "auto" becomes a number."""
    check_alone()
    source = recognise(options.model)
    accelerator, dtype = make_accelerator(options.machine)
    device = accelerator.device.type
    check_optimizer(options.optimization.optimizer, device)
    check_attention(options.machine.attention, device)
    check_bits(BITS[options.machine.base_quantization], device)
    found = read_examples(options)
    views = read_views(found, options, source)
    masks = [masks_of(view, source.latent_px, options.data.mask_floor) for view in views]
    captions = [heard(one, options) for one in found.examples if not one.prior and not one.is_held_out]
    prompts = derived(captions, options.data.caption_prefix, options.data.caption_suffix)
    shots = shots_of(options.previews, resolution_of(options, source), prompts, default_cfg(source.name))
    buckets, repeats = [view.size for view in views], [view.example.repeats for view in views]
    per_epoch = batches_per_epoch(buckets, repeats, batch_size_of(options, source))
    plan = make_plan(options, source, per_epoch, len(captions), sum(repeats))
    name = options.output.output_name if goes_on else free_folder(options).name
    return Job(settled(options, plan, name), source, found, views, masks, shots, plan, accelerator, dtype)


def announce(job: Job, events: Events, notes: Sequence[str] = ()) -> None:
    """What was found and decided, with the reasons."""
    sizes = list(dict.fromkeys(job.buckets))
    pictures = [example for example in job.pictures.examples if not example.prior]
    found = f"{len(pictures)} pictures in {f'{len(sizes)} buckets' if len(sizes) > 1 else f'1 bucket ({sizes[0]})'}"
    if held_out := sum(example.is_held_out for example in pictures):
        found += f", {held_out} of them held out,"
    device, dtype = job.accelerator.device, str(job.dtype).removeprefix("torch.")
    why = [*notes, f"{found} for {job.source.label}, {dtype} on {device}", *job.plan.reasons]
    if job.source.name == "sketch":
        why.append("sketch is the embedded base, for demonstration and tests; name a real one with --base")
    events.emit(
        "plan", name=job.options.output.output_name, steps=job.plan.num_steps, epochs=job.plan.num_epochs, why=why,
        shots=len(job.shots),
    )  # fmt: skip
    told = [told_waste(job.views), told_batches(job.buckets, job.repeats, job.plan.batch_size), job.pictures.told()]
    events.emit(
        "pictures", left_out=list(map(str, job.pictures.left_out)), remarks=list(map(str, job.pictures.remarks)),
        buckets=[asdict(use) for use in bucket_uses(job.views)],
        text="\n".join(filter(None, told)),
    )  # fmt: skip
    done = checked(job.options, job.source, job.pictures, job.views, with_thumbs=False)
    events.emit("checked", **as_json(done), text=told_findings(done))


def free_folder(options: Options) -> Path:
    """A folder that is not there yet: `runs/NAME`, `runs/NAME-2` and so on."""
    wanted = options.output.output_name or name_of_set(options.data.images)
    folder, number = Path(options.output.output_dir) / wanted, 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{wanted}-{number}")
    return folder
