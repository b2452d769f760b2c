"""Several adapters -> one LoRA: exact, truncated, or by a method against interference.

linear: the ranks of all inputs one behind the other, so the change is exactly the weighted sum. svd: that, truncated.
ties: trim, elect a sign, mean of those that agree (Yadav et al. 2023). dare: drop at random and rescale, then sum or
ties (Yu et al. 2024). The last two work on whole deltas, and their result is truncated by SVD.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from scumble.configs.errors import Refused, did_you_mean
from scumble.configs.progress import tracked

from ..system.formatting import format_bytes
from .adapter import Adapter
from .factors import (
    Reduced,
    Reduction,
    change_of,
    check_biases,
    check_dora,
    check_finite,
    collect,
    dtype_of,
    exact_rank,
    factors_of,
    kernel_of,
    module_of,
    reduced,
    reduced_dense,
)
from .keys import ModulePath
from .lowrank import LowRank, Rule, exact_factors, svd_of_factors
from .module import Module
from .weights import Weights

SMALL_RANK = 32  # offered where the exact sum is large
METHODS = ("linear", "svd", "ties", "dare", "dare_ties")


@dataclass(frozen=True)
class Input:
    """One adapter to merge. `blocks` multiplies `weight` in some blocks (`up_blocks.1`, `mid_block`, `text`, …)."""

    name: str
    adapter: Adapter
    weight: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)

    def weight_at(self, place: ModulePath) -> float:
        return self.weight * self.blocks.get(place.block, 1.0)


@dataclass(frozen=True)
class Recipe:
    """How to merge: one of METHODS; the rank of the result (0: the largest input's); share of values kept; seed."""

    method: str = "linear"
    rank: int = 0
    density: float = 0.5
    seed: int = 0


def merge(inputs: Sequence[Input], recipe: Recipe, base: Weights | None = None) -> Reduction:
    """Merge adapters of one family, DoRA by what it changes in `base`'s weights.

    Raises `Refused` for DoRA without them, for other families and shapes, for unknown blocks.
    """
    check_merge(inputs, recipe, base)
    places = sorted({place for one in inputs for place in one.adapter.modules})
    modules = {}
    for place in tracked(places, "merging", len(places)):
        if weighted := weighted_at(inputs, place):
            kernel = kernel_of(place, weighted[0][1], inputs[0].adapter.family)
            modules[place] = _merged(place, weighted, recipe, kernel, base)
    if not modules:
        raise Refused("nothing is left to write: every weight is 0")
    return collect(modules, inputs[0].adapter)


def check_merge(inputs: Sequence[Input], recipe: Recipe, base: Weights | None = None) -> None:
    """Raises `Refused` for what cannot be merged, before any number is computed."""
    if recipe.method not in METHODS:
        known = list(METHODS)
        raise Refused(f"--method {recipe.method}: use {', '.join(known)}{did_you_mean(recipe.method, known)}")
    if not 0 < recipe.density <= 1:
        raise Refused(f"--density {recipe.density:g}: the share of values that is kept is above 0 and at most 1")
    if recipe.rank < 0:
        raise Refused(f"--rank {recipe.rank}: use 1 or more")
    if recipe.method == "linear" and recipe.rank:
        raise Refused(f"--rank {recipe.rank}: linear keeps all ranks; use --method svd")
    first = inputs[0]
    known = sorted({place.block for one in inputs for place in one.adapter.modules})
    for one in inputs:
        check_finite(one.name, one.adapter)
        check_biases(one.name, one.adapter)
        check_dora(one.name, one.adapter, base)
        if one.adapter.family != first.adapter.family:
            raise Refused(
                f"{one.name} is for {one.adapter.family}, {first.name} for {first.adapter.family}: merge "
                "adapters of one kind of base"
            )
        if not math.isfinite(one.weight) or not all(math.isfinite(factor) for factor in one.blocks.values()):
            raise Refused(f"{one.name}: a weight is no finite number")
        for block in one.blocks:
            if block not in known:
                raise Refused(
                    f"--blocks {block}: no input has such a block{did_you_mean(block, known)}; they have {', '.join(known)}"
                )
        for place, module in one.adapter.modules.items():
            if module.label != "LoRA" and not recipe.rank and recipe.method != "linear":
                raise Refused(f"{one.name}: {place} is {module.label}, which has no rank of a LoRA: give --rank")


def weighted_at(inputs: Sequence[Input], place: ModulePath) -> list[tuple[float, Module]]:
    """Weights and modules of the inputs that change a layer."""
    weighted = [(one.weight_at(place), one.adapter.modules.get(place)) for one in inputs]
    return [(weight, module) for weight, module in weighted if module and weight != 0]


def check_size(inputs: Sequence[Input]) -> None:
    """Raises `Refused` where the exact sum needs more than SMALL_RANK for a layer of LoHa, LoKr or DoRA; names whose.

    Tells the size of the exact sum beside that of an SVD of SMALL_RANK; neither is computed for it.
    """
    exact_bytes = small_bytes = 0
    whole: dict[str, str] = {}  # the inputs with such layers, and of what kind their first one is
    for place in sorted({place for one in inputs for place in one.adapter.modules}):
        ranks = []
        for one in inputs:
            for _, module in weighted_at([one], place):
                ranks.append(exact_rank(module))
                if module.label != "LoRA" and ranks[-1] > SMALL_RANK:
                    whole.setdefault(one.name, module.label)
        if weighted := weighted_at(inputs, place):
            first = weighted[0][1]
            assert first.shape
            rank, bytes_a_rank = min(sum(ranks), *first.shape), sum(first.shape) * dtype_of(first).itemsize
            exact_bytes += rank * bytes_a_rank
            small_bytes += min(rank, SMALL_RANK) * bytes_a_rank
    if whole:
        told = ", ".join(f"{name} is {label}" for name, label in whole.items())
        raise Refused(
            f"{told}: the exact sum has whole layers, {format_bytes(exact_bytes)}; cut to rank {SMALL_RANK} it is "
            f"{format_bytes(small_bytes)}: use --method svd --rank {SMALL_RANK}, or --method linear to have it whole"
        )


def rank_stabilised(adapter: Adapter) -> Adapter:
    """The adapter with scales alpha / √rank, not alpha / rank, for files that mean it so (Kalajdzievski 2023)."""
    modules = {
        place: replace(module, alpha=module.scale * module.rank * math.sqrt(module.rank))
        if module.kind == "lora"
        else module
        for place, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


def concatenated(weighted: Sequence[tuple[float, Module]]) -> LowRank | None:
    """Factors of Σ w · dW, ranks one behind the other: [w₁ up₁, w₂ up₂] · [down₁; down₂].

    None where those of a module are not known, or are together no fewer than the layer has inputs or outputs.
    """
    known = [(weight, factors) for weight, module in weighted if (factors := factors_of(module))]
    shape = weighted[0][1].shape
    assert shape
    if len(known) < len(weighted) or sum(len(factors.down) for _, factors in known) >= min(shape):
        return None
    up = torch.cat([weight * factors.up for weight, factors in known], 1)
    return LowRank(up, torch.cat([factors.down for _, factors in known]))


def trimmed(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The delta with only its largest ⌊density · n⌋ values; TIES's first step."""
    kept = int(density * delta.numel())
    if kept >= delta.numel():
        return delta
    flat = torch.zeros(delta.numel(), dtype=delta.dtype)
    index = delta.abs().flatten().topk(kept).indices
    flat[index] = delta.flatten()[index]
    return flat.view_as(delta)


def dropped(delta: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """The delta with each value kept by the chance `density` and divided by it: DARE, the same in expectation."""
    if density >= 1:
        return delta
    return delta * torch.bernoulli(torch.full_like(delta, density), generator=generator) / density


def elected(deltas: torch.Tensor) -> torch.Tensor:
    """TIES's last steps on weighted deltas (N, out, in): the sign of the larger mass, the mean of those of it."""
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agreeing = deltas.sign() == sign
    return (deltas * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def fused(deltas: Sequence[torch.Tensor], weights: Sequence[float], recipe: Recipe, place: ModulePath) -> torch.Tensor:
    """The delta that a method makes of whole deltas (out, in); signs are elected with the weights on."""
    if recipe.method.startswith("dare"):
        generator = torch.Generator().manual_seed(seed_at(place, recipe.seed))
        deltas = [dropped(delta, recipe.density, generator) for delta in deltas]
    elif recipe.method == "ties":
        deltas = [trimmed(delta, recipe.density) for delta in deltas]
    weighted = torch.stack([weight * delta for weight, delta in zip(weights, deltas, strict=True)])
    return elected(weighted) if recipe.method.endswith("ties") else weighted.sum(0)


def seed_at(place: ModulePath, seed: int) -> int:
    """A seed of its own for each layer, so that the draws do not depend on which other layers there are."""
    text = f"{seed} {place.component} {place.path}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def _merged(
    place: ModulePath,
    weighted: Sequence[tuple[float, Module]],
    recipe: Recipe,
    kernel: tuple[int, ...],
    base: Weights | None,
) -> Reduced:
    dtype = dtype_of(weighted[0][1])
    rule = Rule(recipe.rank or max(module.rank for _, module in weighted))
    _check_shapes(place, [module.shape for _, module in weighted])
    factors = concatenated(weighted) if recipe.method in ("linear", "svd") else None
    if factors and recipe.method == "svd":
        return reduced(svd_of_factors(*factors), rule, kernel, dtype)
    if not factors:
        deltas = [change_of(place, module, base) for _, module in weighted]
        delta = fused(deltas, [weight for weight, _ in weighted], recipe, place)
        if recipe.method != "linear":
            return reduced_dense(delta, rule, kernel, dtype)
        factors = exact_factors(delta)
    return Reduced(module_of(factors, kernel, dtype), 0.0, 1.0)


def _check_shapes(place: ModulePath, shapes: Sequence[tuple[int, int] | None]) -> None:
    if len(set(shapes)) > 1:
        told = " and ".join(f"{shape[0]} x {shape[1]}" for shape in dict.fromkeys(shapes) if shape)
        raise Refused(f"{place} has {told} in the inputs: they are of different bases")
