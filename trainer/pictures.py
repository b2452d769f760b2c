"""The pictures of a run as its options want them: which, with what captions, in which crops."""

from dataclasses import replace
from pathlib import Path

from scumble.configs.errors import Refused
from scumble.configs.options import Options
from scumble.datasets.captions import with_trigger
from scumble.datasets.folder import PictureSet, read_set
from scumble.datasets.views import View, tables, views_of

from .bases import Source


def resolution_of(options: Options, source: Source) -> int:
    """Side of the square whose area pictures are brought to."""
    return source.resolution_px if options.data.resolution == "auto" else options.data.resolution


def read_examples(options: Options) -> PictureSet:
    """The pictures of a run, the trigger in their captions."""
    found = read_pictures(options)
    trigger = options.data.trigger
    found.examples = [
        example
        if example.prior
        else replace(
            example,
            caption=with_trigger(example.caption, trigger),
            lines=tuple(with_trigger(line, trigger) for line in example.lines),
        )
        for example in found.examples
    ]
    return found


def read_pictures(options: Options) -> PictureSet:
    """The pictures with their captions as written; regularisation pictures are repeated to be about as many."""
    if not options.data.images:
        raise Refused("train: name a folder of pictures, as in `scumble train photos/`")
    found = read_set(Path(options.data.images), options.data.repeats, masks=options.data.masks)
    if options.data.prior:
        found += read_set(Path(options.data.prior), prior=True, masks=options.data.masks)
    prior = sum(example.repeats for example in found.examples if example.prior)
    times = max(1, round(sum(example.repeats for example in found.examples if not example.prior) / max(1, prior)))
    found.examples = [
        replace(example, repeats=example.repeats * times) if example.prior else example for example in found.examples
    ]
    if all(example.prior for example in found.examples):
        raise Refused(f"{options.data.images}: every picture there is for regularisation, none is left to learn from")
    return found


def read_views(found: PictureSet, options: Options, source: Source) -> list[View]:
    """The crops of each picture at each resolution. Raises `Refused` for a step that the base cannot do."""
    step_px = source.step_px if options.data.bucket_step == "auto" else options.data.bucket_step
    if step_px % source.whole_px:
        raise Refused(f"--bucket-step {step_px}: must be a multiple of {source.whole_px} for {source.label}")
    buckets = tables(options.data, resolution_of(options, source), step_px)
    return views_of(found.examples, buckets, options.data, options.output.seed)
