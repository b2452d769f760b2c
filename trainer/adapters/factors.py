"""Convert modules to plain low-rank factors and back, reduce them to a rank, and measure the error by block."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from scumble.configs.errors import Refused

from .adapter import Adapter
from .compatibility import check_fit
from .keys import ModulePath
from .lowrank import (
    DENSE_SIDE,
    LowRank,
    Rule,
    Svd,
    chosen_rank,
    energy,
    factors_from_svd,
    factors_of_hadamard,
    factors_of_kronecker,
    lost_energy,
    svd_of_dense,
    svd_of_factors,
    svd_of_kronecker,
)
from .module import Module, kronecker_parts, pair
from .weights import Weights

CONV_3X3 = ("conv1", "conv2", "conv", "conv_in", "conv_out")
KERNEL_SLOTS = ("lora_mid", "hada_t1", "lokr_t2", "lora_down", "diff", "lokr_w2")  # by priority


@dataclass(frozen=True)
class Reduced:
    """A module of reduced rank, with the lost energy ‖dW - dW'‖² and the total energy ‖dW‖²."""

    module: Module
    lost: float
    total: float


@dataclass(frozen=True)
class Reduction:
    """An adapter of reduced rank, and the relative error ‖dW - dW'‖ / ‖dW‖ (Frobenius) of each block of the model."""

    adapter: Adapter
    errors: dict[str, float]

    @property
    def rank(self) -> int:
        """The largest rank of all modules."""
        return max(module.rank for module in self.adapter.modules.values())


def factors_of(module: Module) -> LowRank | None:
    """Return up (out, r) and down (r, in · h · w) in fp32, with the scale folded in, so that dW = up · down exactly.

    Returns None if the factors are no smaller than the dense matrix, for DoRA, and for kinds without low-rank factors.
    """
    if module.is_dora or module.kind == "full":
        return None
    if module.kind == "lora":
        up, down = pair(module, "lora_up", "lora_down", "lora_mid")
        return LowRank(module.scale * up, down)
    assert module.shape
    if module.kind == "loha":
        first_up, first_down = pair(module, "hada_w1_a", "hada_w1_b", "hada_t1")
        second = LowRank(*pair(module, "hada_w2_a", "hada_w2_b", "hada_t2"))
        if len(first_down) * len(second.down) >= min(module.shape):
            return None
        return factors_of_hadamard(LowRank(module.scale * first_up, first_down), second)
    if "lokr_w2" in module.tensors:
        return None
    first, second = kronecker_parts(module)[0], pair(module, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    if first.shape[1] * len(second[1]) >= min(module.shape):
        return None
    return factors_of_kronecker(first, LowRank(*second))


def exact_rank(module: Module) -> int:
    """Return the rank at which a LoRA represents dW exactly: that of its factors, or the layer's shorter side."""
    assert module.shape
    return len(factors.down) if (factors := factors_of(module)) else min(module.shape)


def change_of(layer: ModulePath, module: Module, base: Weights | None) -> torch.Tensor:
    """Return W' - W as a matrix (out, in · h · w) in fp32. Only DoRA needs the weight from `base`."""
    if not module.is_dora:
        return module.delta()
    assert base
    weight = base.read(layer).float()
    return (module.on(weight) - weight).flatten(1)


def reduced_change(
    layer: ModulePath, module: Module, rule: Rule, kernel: tuple[int, ...], base: Weights | None
) -> Reduced | None:
    """Return the best LoRA of one module under `rule`, or None if `rule.rank` is needed to avoid a slow full SVD."""
    dtype = dtype_of(module)
    if module.kind == "lokr" and not module.is_dora and "lokr_t2" not in module.tensors:
        return reduced(svd_of_kronecker(*kronecker_parts(module)), rule, kernel, dtype)
    if factors := factors_of(module):
        return reduced(svd_of_factors(*factors), rule, kernel, dtype)
    assert module.shape
    if not rule.rank and min(module.shape) > DENSE_SIDE:
        return None
    return reduced_dense(change_of(layer, module, base), rule, kernel, dtype)


def reduced_dense(delta: torch.Tensor, rule: Rule, kernel: tuple[int, ...], dtype: torch.dtype) -> Reduced:
    """Return the best LoRA of a matrix (out, in · h · w) under `rule`."""
    return reduced(svd_of_dense(delta, rule.rank or min(delta.shape)), rule, kernel, dtype, energy(delta))


def module_of(factors: LowRank, kernel: tuple[int, ...], dtype: torch.dtype) -> Module:
    """Build a LoRA module of scale 1. `kernel` is () for a Linear layer and (h, w) for a convolution."""
    rank, out = len(factors.down), len(factors.up)
    down = factors.down.reshape(rank, -1, *kernel).to(dtype)
    up = factors.up.reshape(out, rank, *(1 for _ in kernel)).to(dtype)
    return Module("lora", {"lora_down": down.contiguous(), "lora_up": up.contiguous()}, float(rank))


def reduced(svd: Svd, rule: Rule, kernel: tuple[int, ...], dtype: torch.dtype, total: float | None = None) -> Reduced:
    """Truncate an SVD to a LoRA under `rule`. `total` is ‖dW‖², required if the SVD is not full."""
    rank = chosen_rank(svd.s, rule, total)
    total_energy = float(svd.s.double().square().sum()) if total is None else total
    module = module_of(factors_from_svd(svd, rank), kernel, dtype)
    return Reduced(module, lost_energy(svd.s, rank, total), total_energy)


def kernel_of(layer: ModulePath, module: Module, family: str) -> tuple[int, ...]:
    """Return the kernel size of a module's layer. For LoHa and LoKr without a Tucker core, it follows from the path."""
    for slot in KERNEL_SLOTS:
        if slot in module.tensors and module.tensors[slot].dim() == 4:
            return tuple(module.tensors[slot].shape[2:])
    if module.kind == "lora" or layer.component != "unet":
        return ()
    last = layer.path.rpartition(".")[2]
    if last in CONV_3X3:
        return (3, 3)
    pointwise = last == "conv_shortcut" or (family == "sd1" and last in ("proj_in", "proj_out"))
    return (1, 1) if pointwise else ()


def dtype_of(module: Module) -> torch.dtype:
    """Return the widest dtype of the module's factors, at least 16-bit. DoRA magnitudes, always fp32, are ignored."""
    stored = [tensor.dtype for slot, tensor in module.tensors.items() if slot != "dora_scale"]
    dtypes = [dtype if dtype.itemsize > 1 else torch.float16 for dtype in stored]
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def collect(modules: Mapping[ModulePath, Reduced], like: Adapter) -> Reduction:
    """Combine reduced modules into one adapter of the same family as `like`, without metadata."""
    lost: dict[str, float] = {}
    total: dict[str, float] = {}
    for layer, one in modules.items():
        lost[layer.block] = lost.get(layer.block, 0.0) + one.lost
        total[layer.block] = total.get(layer.block, 0.0) + one.total
    errors = {block: math.sqrt(lost[block] / total[block]) if total[block] else 0.0 for block in sorted(total)}
    return Reduction(Adapter({layer: one.module for layer, one in modules.items()}, {}, like.family), errors)


def check_dora(name: str, adapter: Adapter, base: Weights | None) -> None:
    """Raises `Refused` if the adapter has DoRA modules and `base` is missing or does not fit."""
    found = next((layer for layer, module in adapter.modules.items() if module.is_dora), None)
    if found and base is None:
        raise Refused(f"{name}: {found} is DoRA, whose effect depends on the base; name the base with --base FILE")
    if found and base:
        check_fit(name, adapter, base)


def check_finite(name: str, adapter: Adapter) -> None:
    """Raises `Refused` if a module has non-finite values."""
    found = next((layer for layer, module in adapter.modules.items() if not module.is_finite), None)
    if found:
        raise Refused(f"{name}: {found} has non-finite values (NaN or Inf); the file is damaged, use another one")


def check_biases(name: str, adapter: Adapter) -> None:
    """Raises `Refused` if a module also changes a bias, which a LoRA cannot represent."""
    found = next((layer for layer, module in adapter.modules.items() if "diff_b" in module.tensors), None)
    if found:
        raise Refused(f"{name}: {found} also changes a bias (diff_b), which is not supported and would be lost")
