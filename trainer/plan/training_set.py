"""The pictures of a run as its options want them: which, with what captions, in which crops."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from scumble.configs.errors import Refused
from scumble.configs.options import Options
from scumble.datasets.captions import CERTAIN, ruled, said, with_trigger
from scumble.datasets.checkup.checkup import Checkup, check
from scumble.datasets.checkup.token_window import read_windows
from scumble.datasets.crops import View, tables, views_of
from scumble.datasets.reading.folder import Example, PictureSet, read_set

from ..base_model.detect import Source


def resolution_of(options: Options, source: Source) -> int:
    """Side of the square whose area pictures are brought to."""
    return source.resolution_px if options.data.resolution == "auto" else options.data.resolution


def read_examples(options: Options) -> PictureSet:
    """The pictures, the trigger in their captions; regularisation pictures are repeated to be about as many."""
    if not options.data.images:
        raise Refused("train: name a folder of pictures, as in `scumble train photos/`")
    found = read_set(Path(options.data.images), options.data.repeats, masks=options.data.masks)
    if options.data.prior:
        found += read_set(Path(options.data.prior), prior=True, masks=options.data.masks)
    found.examples = with_held_out(found.examples, options.data.validation_split, options.output.seed)
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


def with_held_out(examples: list[Example], share: float, seed: int) -> list[Example]:
    """The examples, a share of those to learn from held out, at least one where it is not 0.

    They are chosen by what their files hold: copies stay together, and names or other pictures change no choice.
    Raises `Refused` where none is left to learn from.
    """
    if not share:
        return examples
    from scumble.datasets.cache import digest_of_file  # imports torch, which `scumble check` does without

    keys = {
        example.image: hashlib.blake2b(f"{seed}/{digest_of_file(example.image)}".encode()).digest()
        for example in examples
        if not example.prior
    }
    distinct = sorted(set(keys.values()))
    out = set(distinct[: max(1, round(share * len(distinct)))])
    if len(out) == len(distinct):
        raise Refused(
            f"--validation-split {share:g}: holds out all of {len(keys)} pictures; add some, or take a smaller share"
        )
    return [replace(example, repeats=0) if keys.get(example.image) in out else example for example in examples]


def read_views(found: PictureSet, options: Options, source: Source) -> list[View]:
    """The crops of each picture at each resolution. Raises `Refused` for a step that the base cannot do."""
    step_px = source.step_px if options.data.bucket_step == "auto" else options.data.bucket_step
    if step_px % source.whole_px:
        raise Refused(f"--bucket-step {step_px}: must be a multiple of {source.whole_px} for {source.label}")
    buckets = tables(options.data, resolution_of(options, source), step_px)
    return views_of(found.examples, buckets, options.data, options.output.seed)


def heard(example: Example, options: Options) -> str:
    """What training says of a picture where chance takes nothing away and shuffles nothing."""
    data = options.data.model_copy(update={"trigger": "", "prefix": "", "suffix": ""} if example.prior else {})
    rules = ruled(data, example.rules).model_copy(update=CERTAIN)
    return said(example.lines, rules, seed=options.output.seed, step=0, index=0)


def checked(
    options: Options,
    source: Source,
    found: PictureSet,
    views: list[View],
    with_thumbs: bool,
    tell: Callable[[int], None] = lambda done: None,
) -> Checkup:
    """The check-up of a run's pictures and captions, by what the base hears of them."""
    return check(
        found, views, kind=options.data.kind, trigger=options.data.trigger,
        windows=read_windows(source.tokenizers),
        heard=lambda example: heard(example, options),
        with_thumbs=with_thumbs, tell=tell,
    )  # fmt: skip
