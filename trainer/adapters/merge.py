"""Merge several adapters into one LoRA: exactly, truncated, or with a method that reduces interference.

linear: concatenate the ranks of all inputs, which gives exactly the weighted sum. svd: truncate that sum. ties: trim,
elect signs, average the values that agree (Yadav et al. 2023). dare, dare_ties: drop values at random and rescale, then
sum or TIES (Yu et al. 2024). TIES and DARE work on dense deltas, and an SVD truncates the result.
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

SMALL_RANK = 32  # suggested if the exact sum is large
METHODS = ("linear", "svd", "ties", "dare", "dare_ties")


@dataclass(frozen=True)
class Input:
    """An adapter to merge. `blocks` multiplies `weight` in some blocks (`up_blocks.1`, `mid_block`, `text`, …)."""

    name: str
    adapter: Adapter
    weight: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)

    def weight_at(self, layer: ModulePath) -> float:
        return self.weight * self.blocks.get(layer.block, 1.0)


@dataclass(frozen=True)
class Recipe:
    """How to merge: one of METHODS, rank of the result (0: largest input rank), share of values to keep, seed."""

    method: str = "linear"
    rank: int = 0
    density: float = 0.5
    seed: int = 0


def merge(inputs: Sequence[Input], recipe: Recipe, base: Weights | None = None) -> Reduction:
    """Merge adapters of one family. For DoRA, the change that it makes to the weights of `base` is merged.

    Raises `Refused` for DoRA without a base, for different families or shapes, and for unknown blocks.
    """
    check_merge(inputs, recipe, base)
    layers = sorted({layer for one in inputs for layer in one.adapter.modules})
    modules = {}
    for layer in tracked(layers, "merging", len(layers)):
        if weighted := weighted_at(inputs, layer):
            kernel = kernel_of(layer, weighted[0][1], inputs[0].adapter.family)
            modules[layer] = _merged(layer, weighted, recipe, kernel, base)
    if not modules:
        raise Refused("--weights: all weights are 0, so the result is empty; use at least one non-zero weight")
    return collect(modules, inputs[0].adapter)


def check_merge(inputs: Sequence[Input], recipe: Recipe, base: Weights | None = None) -> None:
    """Raises `Refused` if the inputs cannot be merged, before any computation."""
    if recipe.method not in METHODS:
        known = list(METHODS)
        raise Refused(f"--method {recipe.method}: must be {' | '.join(known)}{did_you_mean(recipe.method, known)}")
    if not 0 < recipe.density <= 1:
        raise Refused(f"--density {recipe.density:g}: must be above 0 and at most 1")
    if recipe.rank < 0:
        raise Refused(f"--rank {recipe.rank}: must be 0 or more (0: the largest rank of the files)")
    if recipe.method == "linear" and recipe.rank:
        raise Refused(f"--rank {recipe.rank}: the linear method keeps all ranks; use --method svd")
    first = inputs[0]
    known = sorted({layer.block for one in inputs for layer in one.adapter.modules})
    for one in inputs:
        check_finite(one.name, one.adapter)
        check_biases(one.name, one.adapter)
        check_dora(one.name, one.adapter, base)
        if one.adapter.family != first.adapter.family:
            raise Refused(
                f"{one.name}: made for {one.adapter.family}, but {first.name} is for {first.adapter.family}; "
                "merge adapters of one family"
            )
        if not math.isfinite(one.weight) or not all(math.isfinite(factor) for factor in one.blocks.values()):
            raise Refused(f"{one.name}: its weight or a block factor is not finite; use finite numbers")
        for block in one.blocks:
            if block not in known:
                raise Refused(
                    f"--blocks {block}: no such block in the files{did_you_mean(block, known)}; use {', '.join(known)}"
                )
        for layer, module in one.adapter.modules.items():
            if module.label != "LoRA" and not recipe.rank and recipe.method != "linear":
                raise Refused(f"{one.name}: {layer} is {module.label}, which has no LoRA rank; set --rank")


def weighted_at(inputs: Sequence[Input], layer: ModulePath) -> list[tuple[float, Module]]:
    """Return the weights and modules of the inputs that change a layer."""
    weighted = [(one.weight_at(layer), one.adapter.modules.get(layer)) for one in inputs]
    return [(weight, module) for weight, module in weighted if module and weight != 0]


def check_size(inputs: Sequence[Input]) -> None:
    """Raises `Refused` if the exact sum needs more than SMALL_RANK for a LoHa, LoKr or DoRA layer.

    The message names these inputs and the sizes of the exact sum and of an SVD of SMALL_RANK; neither is computed.
    """
    exact_bytes = small_bytes = 0
    large: dict[str, str] = {}  # inputs with such layers -> kind of the first one
    for layer in sorted({layer for one in inputs for layer in one.adapter.modules}):
        ranks = []
        for one in inputs:
            for _, module in weighted_at([one], layer):
                ranks.append(exact_rank(module))
                if module.label != "LoRA" and ranks[-1] > SMALL_RANK:
                    large.setdefault(one.name, module.label)
        if weighted := weighted_at(inputs, layer):
            first = weighted[0][1]
            assert first.shape
            rank, bytes_per_rank = min(sum(ranks), *first.shape), sum(first.shape) * dtype_of(first).itemsize
            exact_bytes += rank * bytes_per_rank
            small_bytes += min(rank, SMALL_RANK) * bytes_per_rank
    if large:
        inputs_text = ", ".join(f"{name} is {label}" for name, label in large.items())
        raise Refused(
            f"{inputs_text}: the exact sum needs full-rank layers ({format_bytes(exact_bytes)}, or "
            f"{format_bytes(small_bytes)} at rank {SMALL_RANK}); use --method svd --rank {SMALL_RANK}, "
            "or --method linear for the exact sum"
        )


def rank_stabilized(adapter: Adapter) -> Adapter:
    """Return the adapter with rsLoRA scales, alpha / √rank instead of alpha / rank (Kalajdzievski 2023)."""
    modules = {
        layer: replace(module, alpha=module.scale * module.rank * math.sqrt(module.rank))
        if module.kind == "lora"
        else module
        for layer, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


def concatenated(weighted: Sequence[tuple[float, Module]]) -> LowRank | None:
    """Return factors of Σ w · dW with concatenated ranks: [w₁ up₁, w₂ up₂] · [down₁; down₂].

    Returns None if a module has no known factors, or if the total rank is at least the layer's shorter side.
    """
    known = [(weight, factors) for weight, module in weighted if (factors := factors_of(module))]
    shape = weighted[0][1].shape
    assert shape
    if len(known) < len(weighted) or sum(len(factors.down) for _, factors in known) >= min(shape):
        return None
    up = torch.cat([weight * factors.up for weight, factors in known], 1)
    return LowRank(up, torch.cat([factors.down for _, factors in known]))


def trimmed(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Keep only the ⌊density · n⌋ largest values of the delta by magnitude: the first step of TIES."""
    kept = int(density * delta.numel())
    if kept >= delta.numel():
        return delta
    flat = torch.zeros(delta.numel(), dtype=delta.dtype)
    index = delta.abs().flatten().topk(kept).indices
    flat[index] = delta.flatten()[index]
    return flat.view_as(delta)


def dropped(delta: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Keep each value of the delta with probability `density` and divide it by `density`: DARE, unbiased."""
    if density >= 1:
        return delta
    return delta * torch.bernoulli(torch.full_like(delta, density), generator=generator) / density


def elected(deltas: torch.Tensor) -> torch.Tensor:
    """Elect the sign of the sum at each position and average the values that have it: the last steps of TIES.

    `deltas` are the weighted deltas (N, out, in).
    """
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agreeing = deltas.sign() == sign
    return (deltas * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def combine(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], recipe: Recipe, layer: ModulePath
) -> torch.Tensor:
    """Combine dense deltas (out, in) with the recipe's method. Weights are applied before signs are elected."""
    if recipe.method.startswith("dare"):
        generator = torch.Generator().manual_seed(seed_at(layer, recipe.seed))
        deltas = [dropped(delta, recipe.density, generator) for delta in deltas]
    elif recipe.method == "ties":
        deltas = [trimmed(delta, recipe.density) for delta in deltas]
    weighted = torch.stack([weight * delta for weight, delta in zip(weights, deltas, strict=True)])
    return elected(weighted) if recipe.method.endswith("ties") else weighted.sum(0)


def seed_at(layer: ModulePath, seed: int) -> int:
    """Return a separate seed for each layer, so that its random values do not depend on the other layers."""
    text = f"{seed} {layer.component} {layer.path}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def _merged(
    layer: ModulePath,
    weighted: Sequence[tuple[float, Module]],
    recipe: Recipe,
    kernel: tuple[int, ...],
    base: Weights | None,
) -> Reduced:
    dtype = dtype_of(weighted[0][1])
    rule = Rule(recipe.rank or max(module.rank for _, module in weighted))
    _check_shapes(layer, [module.shape for _, module in weighted])
    factors = concatenated(weighted) if recipe.method in ("linear", "svd") else None
    if factors and recipe.method == "svd":
        return reduced(svd_of_factors(*factors), rule, kernel, dtype)
    if not factors:
        deltas = [change_of(layer, module, base) for _, module in weighted]
        delta = combine(deltas, [weight for weight, _ in weighted], recipe, layer)
        if recipe.method != "linear":
            return reduced_dense(delta, rule, kernel, dtype)
        factors = exact_factors(delta)
    return Reduced(module_of(factors, kernel, dtype), 0.0, 1.0)


def _check_shapes(layer: ModulePath, shapes: Sequence[tuple[int, int] | None]) -> None:
    if len(set(shapes)) > 1:
        sizes = " and ".join(f"{shape[0]} x {shape[1]}" for shape in dict.fromkeys(shapes) if shape)
        raise Refused(f"{layer}: is {sizes} in the files; merge adapters made for one base")
