"""The training set of a run: its images, captions and crops, as the options define them."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from scumble.configs.errors import Refused
from scumble.configs.options import Options
from scumble.datasets.captions import NOT_RANDOM, caption_at_step, with_folder_rules, with_trigger
from scumble.datasets.checkup.checkup import Checkup, check_images
from scumble.datasets.checkup.token_window import read_windows
from scumble.datasets.crops import CroppedExample, crop_examples, tables
from scumble.datasets.reading.folder import Example, ImageSet, read_set

from ..base_model.detect import DetectedBase

HELD_OUT_BY_SIZE = (8, 0), (16, 2), (31, 4), (51, 6), (math.inf, 8)
"""Pairs of (limit, count) for validation_split = auto: below `limit` images, `count` are held out."""


def resolution_of(options: Options, source: DetectedBase) -> int:
    """The side of the square whose area the images are scaled to."""
    return source.resolution_px if options.data.resolution == "auto" else options.data.resolution


def read_examples(options: Options) -> ImageSet:
    """Read the images and add the trigger to captions; regularization images are repeated to about the same number."""
    if not options.data.images:
        raise Refused("train: no images given; name a folder, as in `scumble train photos/`")
    found = read_set(Path(options.data.images), options.data.repeats, masks=options.data.masks)
    if options.data.regularization_images:
        found += read_set(Path(options.data.regularization_images), is_regularization=True, masks=options.data.masks)
    found = hold_out(found, options)
    num_trained = sum(example.repeats for example in found.examples if not example.is_regularization)
    num_regularization = sum(example.repeats for example in found.examples if example.is_regularization)
    times = max(1, round(num_trained / max(1, num_regularization)))
    found.examples = [
        replace(example, repeats=example.repeats * times)
        if example.is_regularization
        else replace(
            example, caption=with_trigger(example.caption, options.data.trigger, options.data.trigger_position)
        )
        for example in found.examples
    ]
    if all(example.is_regularization for example in found.examples):
        raise Refused(f"{options.data.images}: contains only regularization images; add images to train on")
    return found


def hold_out(found: ImageSet, options: Options) -> ImageSet:
    """The set with images held out as `validation_split` says: their repeats are 0, so they are never trained on.

    A folder adds its images, which are not trained on even if they are also in the training folder. Otherwise images
    are chosen by a hash of their content and the seed: copies stay together, and file names or other images do not
    change the choice. Raises `Refused` if no image would be left to train on.
    """
    split = options.data.validation_split
    if split == "off":
        return found
    trained = [example for example in found.examples if not example.is_regularization]
    distinct = sorted({_draw(example, options.output.seed) for example in trained})
    if isinstance(split, str) and split != "auto":
        further = read_set(Path(split), masks=options.data.masks)
        chosen = {example.digest for example in further.examples}
        found.examples = [one for one in found.examples if one.is_regularization or one.digest not in chosen]
        further.examples = [replace(example, repeats=0) for example in further.examples]
        if all(example.is_regularization for example in found.examples):
            raise Refused(f"--validation-split {split}: contains every training image; remove some of them")
        return found + further
    count = num_held_out(split, len(distinct))
    if count >= len(distinct):
        raise Refused(
            f"--validation-split {split:g}: holds out all {len(trained)} images; add images, or hold out fewer"
        )
    out = set(distinct[:count])
    found.examples = [
        one if one.is_regularization or _draw(one, options.output.seed) not in out else replace(one, repeats=0)
        for one in found.examples
    ]
    return found


def num_held_out(split: str | float, num_images: int) -> int:
    """How many of `num_images` distinct images to hold out: a count, a share (at least 1), or by the set size."""
    if isinstance(split, int):
        return split
    if isinstance(split, float):
        return max(1, round(split * num_images))
    return next(count for limit, count in HELD_OUT_BY_SIZE if num_images < limit)


def _draw(example: Example, seed: int) -> bytes:
    """A random number of an example that depends only on its content and the seed."""
    return hashlib.blake2b(f"{seed}/{example.digest}".encode()).digest()


def crop_set(found: ImageSet, options: Options, source: DetectedBase) -> list[CroppedExample]:
    """The crops of each image at each resolution. Raises `Refused` if the base does not support `bucket_reso_steps`."""
    step_px = source.step_px if options.data.bucket_reso_steps == "auto" else options.data.bucket_reso_steps
    if step_px % source.whole_px:
        raise Refused(f"--bucket-reso-steps {step_px}: must be a multiple of {source.whole_px} for {source.label}")
    buckets = tables(options.data, resolution_of(options, source), step_px)
    return crop_examples(found.examples, buckets, options.data, options.output.seed)


def caption_text(example: Example, options: Options) -> str:
    """The training prompt of an example, without anything that is dropped or shuffled at random."""
    data = options.data.model_copy(
        update={"trigger": "", "caption_prefix": "", "caption_suffix": ""} if example.is_regularization else {}
    )
    rules = with_folder_rules(data, example.rules).model_copy(update=NOT_RANDOM)
    return caption_at_step(example.lines, rules, seed=options.output.seed, step=0, index=0)


def run_checkup(
    options: Options,
    source: DetectedBase,
    found: ImageSet,
    cropped: list[CroppedExample],
    with_thumbs: bool,
    advance: Callable[[int], None] = lambda done: None,
) -> Checkup:
    """Check the images of a run and their training prompts; `advance` is called with the number of images done."""
    return check_images(
        found, cropped, kind=options.data.kind, trigger=options.data.trigger,
        windows=read_windows(source.tokenizers),
        caption_text=lambda example: caption_text(example, options),
        with_thumbs=with_thumbs, progress=advance,
    )  # fmt: skip
