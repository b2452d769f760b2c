"""Extract a LoRA from two models: the best low-rank approximation of the change that fine-tuning made to each layer.

Both models stay on disk; one layer of each is read at a time. Each model is a folder or a single file.
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

SD2_UNUSED = "encoder.layers.23."  # last text encoder layer: stored in SD 2 files, but unused by every program


def extract(
    base: Path,
    tuned: Path,
    rule: Rule,
    text: bool = True,
    convs: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Reduction:
    """Return the LoRA that turns `base` into `tuned` at attention and feed-forward layers, and its error by block.

    `text` includes the text encoders; `convs` includes resnets, downsamplers and upsamplers. Unchanged layers are
    skipped. Uses a full SVD if the shorter side is at most 512, else a randomized SVD with `rule.rank` values, see
    `svd_of_dense`. Raises `Refused` if the models are incompatible or equal, or if `rule` has no rank.
    """
    if rule.rank < 1:
        raise Refused(f"--rank {rule.rank}: must be 1 or more; --energy can choose a smaller rank for each layer")
    if not 0 <= rule.energy <= 1:
        raise Refused(f"--energy {rule.energy:g}: must be a number from 0 to 1")
    first, second = find_weights(base), find_weights(tuned)
    if first.family != second.family:
        raise Refused(f"{tuned}: is {second.family}, but --base {base} is {first.family}; use models of one family")
    layers = shared_layers(first, second, text, convs)
    modules = {}
    for layer in tracked(layers, "extracting", len(layers)):
        found = difference(first, second, layer, rule, dtype)
        if found:
            modules[layer] = found
    if not modules:
        raise Refused(f"{tuned}: does not differ from {base} in any layer that an adapter can change")
    return collect(modules, Adapter({}, {}, first.family))


def shared_layers(first: Weights, second: Weights, text: bool, convs: bool) -> list[ModulePath]:
    """Return the layers of both models that UIs support in adapters. Raises `Refused` if the UNet layers differ."""
    unet = re.compile(f"{FULL}|{CONVS}" if convs else FULL)

    def supported(weights: Weights) -> set[ModulePath]:
        return {
            layer
            for layer in weights.layers
            if (layer.component == "unet" and unet.fullmatch(layer.path))
            or (text and layer.component != "unet" and re.fullmatch(TEXT, layer.path))
        }

    one, other = supported(first), supported(second)
    differing = sorted(layer for layer in one ^ other if layer.component == "unet")
    if differing:
        where = second.path if differing[0] in one else first.path
        raise Refused(
            f"{where}: is missing {differing[0].path}, which the other model has; use models of one architecture"
        )
    unused = {layer for layer in one if first.family == "sd2" and layer.path.startswith(SD2_UNUSED)}
    return sorted((one & other) - unused)


def difference(first: Weights, second: Weights, layer: ModulePath, rule: Rule, dtype: torch.dtype) -> Reduced | None:
    """Return the LoRA of one layer's difference, or None if the weights are equal."""
    base, tuned = first.read(layer), second.read(layer)
    if base.flatten(1).shape != tuned.flatten(1).shape:
        shapes = f"{tuple(tuned.shape)} in {second.path}, {tuple(base.shape)} in {first.path}"
        raise Refused(f"{layer}: is {shapes}; use models of one architecture")
    delta = tuned.float().flatten(1) - base.float().flatten(1)
    if not delta.any():
        return None
    if not torch.isfinite(delta).all():
        raise Refused(f"{layer}: has non-finite values in {second.path} or {first.path}")
    return reduced_dense(delta, rule, tuple(base.shape[2:]), dtype)
