"""A job: what a run will do, prepared and checked before a weight is loaded."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from scumble.configs.options import Options
from scumble.configs.words import counted
from scumble.datasets.batches import batches_per_epoch, describe_batches
from scumble.datasets.checkup.checkup import Checkup
from scumble.datasets.crop_loss import bucket_uses, describe_crop_loss
from scumble.datasets.crops import CroppedExample
from scumble.datasets.reading.folder import Example, ImageSet
from scumble.datasets.reading.images import Crop, Size
from scumble.datasets.tensors import masks_of

from ..base_model.detect import DetectedBase, detect_base
from ..base_model.quantize import BITS, check_bits
from ..previews.prompts import PreviewPrompt, default_guidance_scale, preview_prompts, prompts_from_captions
from ..run.events import Events
from ..run.folder import name_of_set
from ..system.device import check_attention, check_single_process, make_accelerator
from ..training.optimizers import check_optimizer
from .findings import as_json, describe_findings
from .plan import Plan, batch_size_of, make_plan, settled
from .training_set import caption_text, crop_set, read_examples, resolution_of, run_checkup


@dataclass(frozen=True)
class Job:
    """What a run will do. In `options` every "auto" is settled; `masks[i]` are those of the crops of example i."""

    options: Options
    source: DetectedBase
    image_set: ImageSet
    cropped: list[CroppedExample]
    masks: list[tuple[torch.Tensor, ...]]
    checkup: Checkup
    preview_prompts: list[PreviewPrompt]
    plan: Plan
    accelerator: Accelerator
    dtype: torch.dtype

    @property
    def examples(self) -> list[Example]:
        return [one.example for one in self.cropped]

    @property
    def crops(self) -> list[tuple[Crop, ...]]:
        return [one.crops for one in self.cropped]

    @property
    def buckets(self) -> list[Size]:
        return [one.size for one in self.cropped]

    @property
    def repeats(self) -> list[int]:
        return [example.repeats for example in self.examples]

    @property
    def held_out(self) -> list[int]:
        """Indices of the examples that are never trained on, only measured."""
        return [index for index, example in enumerate(self.examples) if example.is_held_out]


def prepare_job(options: Options, is_resumed: bool = False) -> Job:
    """Check everything that can be wrong (base, images, optimizer, prompts) and turn every "auto" into a number."""
    check_single_process()
    source = detect_base(options.model)
    accelerator, dtype = make_accelerator(options.machine)
    device = accelerator.device.type
    check_optimizer(options.optimization.optimizer, device)
    check_attention(options.machine.attention, device)
    check_bits(BITS[options.machine.base_quantization], device)
    found = read_examples(options)
    cropped = crop_set(found, options, source)
    masks = [masks_of(one, source.latent_px, options.data.mask_floor) for one in cropped]
    captions = [
        caption_text(one, options) for one in found.examples if not one.is_regularization and not one.is_held_out
    ]
    prompts = preview_prompts(
        options.previews,
        resolution_of(options, source),
        prompts_from_captions(captions, options.data.caption_prefix, options.data.caption_suffix),
        default_guidance_scale(source.name),
    )
    buckets, repeats = [one.size for one in cropped], [one.example.repeats for one in cropped]
    per_epoch = batches_per_epoch(buckets, repeats, batch_size_of(options, source))
    plan = make_plan(options, source, per_epoch, len(captions), sum(repeats))
    name = options.output.output_name if is_resumed else free_folder(options).name
    checkup = run_checkup(options, source, found, cropped, with_thumbs=False)
    return Job(settled(options, plan, name), source, found, cropped, masks, checkup, prompts, plan, accelerator, dtype)


def emit_plan(job: Job, events: Events, notes: Sequence[str] = ()) -> None:
    """Emit what was found and decided, with the reasons."""
    sizes = list(dict.fromkeys(job.buckets))
    images = [example for example in job.image_set.examples if not example.is_regularization]
    found = f"{counted(len(images), 'image')} in " + (
        f"{len(sizes)} buckets" if len(sizes) > 1 else f"1 bucket ({sizes[0]})"
    )
    if num_held_out := len(job.held_out):
        found += f", {num_held_out} of them held out,"
    device, dtype = job.accelerator.device, str(job.dtype).removeprefix("torch.")
    reasons = [*notes, f"{found} for {job.source.label}, {dtype} on {device}", *job.plan.reasons]
    if job.source.name == "sketch":
        reasons.append("sketch is the embedded base, for demonstration and tests; name your own with --base")
    events.emit(
        "plan", name=job.options.output.output_name, steps=job.plan.num_steps, epochs=job.plan.num_epochs,
        reasons=reasons, preview_prompts=len(job.preview_prompts),
    )  # fmt: skip
    lines = [
        describe_crop_loss(job.cropped),
        describe_batches(job.buckets, job.repeats, job.plan.batch_size),
        job.image_set.describe(),
    ]
    events.emit(
        "images", left_out=list(map(str, job.image_set.left_out)), remarks=list(map(str, job.image_set.remarks)),
        buckets=[asdict(use) for use in bucket_uses(job.cropped)],
        text="\n".join(filter(None, lines)),
    )  # fmt: skip
    events.emit("checkup", **as_json(job.checkup), text=describe_findings(job.checkup))


def free_folder(options: Options) -> Path:
    """A folder that does not exist yet: `runs/NAME`, `runs/NAME-2` and so on."""
    wanted = options.output.output_name or name_of_set(options.data.images)
    folder, number = Path(options.output.output_dir) / wanted, 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{wanted}-{number}")
    return folder
