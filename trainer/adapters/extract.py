"""A LoRA out of two models: what fine-tuning added to each layer's weight, in the best factors of a rank.

Both models stay on disk; one layer of each is read at a time. Folder or one file, in any mixture.
"""

import re
from pathlib import Path

import torch

from scumble.configs.errors import Refused
from scumble.configs.progress import tracked

from .adapter import Adapter
from .factors import Reduced, Reduction, collect, reduced_dense
from .keys import ModulePath
from .lowrank import Rule
from .targets import CONVS, FULL, TEXT
from .weights import Weights, find_weights

SD2_UNUSED = "encoder.layers.23."  # the last layer of SD 2's text encoder is in its files, but no program runs it


def extract(
    base: Path,
    tuned: Path,
    rule: Rule,
    text: bool = True,
    convs: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Reduction:
    """The LoRA that turns `base` into `tuned` at attention and feed-forward layers, with its error by block.

    `text` takes the text encoders too, `convs` the resnets and samplers. Layers that are equal are left out. A whole
    SVD is made where the shorter side is at most 512, else a randomised one of `rule.rank` values, see `svd_of_dense`.
    Raises `Refused` where the models are of different kinds or do not differ, and where `rule` has no rank.
    """
    if rule.rank < 1:
        raise Refused(f"--rank {rule.rank}: say how large a rank may be, 1 or more; --energy then chooses below it")
    if not 0 <= rule.energy <= 1:
        raise Refused(f"--energy {rule.energy:g}: a share is between 0 and 1")
    first, second = find_weights(base), find_weights(tuned)
    if first.family != second.family:
        raise Refused(f"{tuned} is a base of {second.family}, {base} of {first.family}")
    places = shared_places(first, second, text, convs)
    modules = {}
    for place in tracked(places, "extracting", len(places)):
        found = difference(first, second, place, rule, dtype)
        if found:
            modules[place] = found
    if not modules:
        raise Refused(f"{tuned} and {base} do not differ in any layer that an adapter can have")
    return collect(modules, Adapter({}, {}, first.family))


def shared_places(first: Weights, second: Weights, text: bool, convs: bool) -> list[ModulePath]:
    """The layers of both models that programs know in adapters. Raises `Refused` where the UNets differ in layers."""
    unet = re.compile(f"{FULL}|{CONVS}" if convs else FULL)

    def wanted(places: Weights) -> set[ModulePath]:
        return {
            place
            for place in places.spots
            if (place.component == "unet" and unet.fullmatch(place.path))
            or (text and place.component != "unet" and re.fullmatch(TEXT, place.path))
        }

    one, other = wanted(first), wanted(second)
    differing = sorted(place for place in one ^ other if place.component == "unet")
    if differing:
        where = second.path if differing[0] in one else first.path
        raise Refused(f"{where} lacks {differing[0].path}, which the other model has: they are of different kinds")
    unused = {place for place in one if first.family == "sd2" and place.path.startswith(SD2_UNUSED)}
    return sorted((one & other) - unused)


def difference(first: Weights, second: Weights, place: ModulePath, rule: Rule, dtype: torch.dtype) -> Reduced | None:
    """The LoRA of one layer's difference; None where there is none."""
    base, tuned = first.read(place), second.read(place)
    if base.flatten(1).shape != tuned.flatten(1).shape:
        shapes = f"{tuple(tuned.shape)} in {second.path}, {tuple(base.shape)} in {first.path}"
        raise Refused(f"{place} is {shapes}: they are of different kinds")
    delta = tuned.float().flatten(1) - base.float().flatten(1)
    if not delta.any():
        return None
    if not torch.isfinite(delta).all():
        raise Refused(f"{place} is not finite in {second.path} or {first.path}")
    return reduced_dense(delta, rule, tuple(base.shape[2:]), dtype)
