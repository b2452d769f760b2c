"""Modules <-> plain matrices: two factors, a reduction of them to a rank, and the error of that by block."""

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
CORES = ("lora_mid", "hada_t1", "lokr_t2", "lora_down", "diff", "lokr_w2")  # slots that tell a kernel, the first first


@dataclass(frozen=True)
class Reduced:
    """A module of lower rank, with ‖dW - dW'‖² and ‖dW‖²."""

    module: Module
    lost: float
    total: float


@dataclass(frozen=True)
class Reduction:
    """An adapter of lower rank, and for each block of the model ‖dW - dW'‖ / ‖dW‖ (Frobenius) over its modules."""

    adapter: Adapter
    errors: dict[str, float]

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(module.rank for module in self.adapter.modules.values())


def factors_of(module: Module) -> LowRank | None:
    """up (out, r) and down (r, in · h · w) in fp32, the scale in one of them: dW = up · down exactly.

    None where they have no advantage over the whole matrix, where DoRA is, or where nothing is known of it.
    """
    if module.is_dora or module.kind == "full":
        return None
    if module.kind == "lora":
        up, down = pair(module, "lora_up", "lora_down", "lora_mid")
        return LowRank(module.scale * up, down)
    assert module.shape
    if module.kind == "loha":
        ones = pair(module, "hada_w1_a", "hada_w1_b", "hada_t1")
        twos = pair(module, "hada_w2_a", "hada_w2_b", "hada_t2")
        if len(ones[1]) * len(twos[1]) >= min(module.shape):
            return None
        return factors_of_hadamard(LowRank(module.scale * ones[0], ones[1]), LowRank(*twos))
    if "lokr_w2" in module.tensors:
        return None
    first, second = kronecker_parts(module)[0], pair(module, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    if first.shape[1] * len(second[1]) >= min(module.shape):
        return None
    return factors_of_kronecker(first, LowRank(*second))


def exact_rank(module: Module) -> int:
    """The rank at which dW is a LoRA exactly: that of its factors, or the layer's shorter side."""
    assert module.shape
    return len(known.down) if (known := factors_of(module)) else min(module.shape)


def change_of(place: ModulePath, module: Module, base: Weights | None) -> torch.Tensor:
    """W' - W as a matrix (out, in · h · w) in fp32; only DoRA reads `base`'s weight for it."""
    if not module.is_dora:
        return module.delta()
    assert base
    weight = base.read(place).float()
    return (module.on(weight) - weight).flatten(1)


def reduced_change(
    place: ModulePath, module: Module, rule: Rule, kernel: tuple[int, ...], base: Weights | None
) -> Reduced | None:
    """The best LoRA that `rule` makes of one module; None where it needs a rank, lest the SVD take minutes a layer."""
    dtype = dtype_of(module)
    if module.kind == "lokr" and not module.is_dora and "lokr_t2" not in module.tensors:
        return reduced(svd_of_kronecker(*kronecker_parts(module)), rule, kernel, dtype)
    if known := factors_of(module):
        return reduced(svd_of_factors(*known), rule, kernel, dtype)
    assert module.shape
    if not rule.rank and min(module.shape) > DENSE_SIDE:
        return None
    return reduced_dense(change_of(place, module, base), rule, kernel, dtype)


def reduced_dense(delta: torch.Tensor, rule: Rule, kernel: tuple[int, ...], dtype: torch.dtype) -> Reduced:
    """The best LoRA that `rule` makes of a matrix (out, in · h · w)."""
    return reduced(svd_of_dense(delta, rule.rank or min(delta.shape)), rule, kernel, dtype, energy(delta))


def module_of(factors: LowRank, kernel: tuple[int, ...], dtype: torch.dtype) -> Module:
    """A LoRA of scale 1; `kernel` is () for a Linear, (h, w) for a convolution."""
    rank, out = len(factors.down), len(factors.up)
    down = factors.down.reshape(rank, -1, *kernel).to(dtype)
    up = factors.up.reshape(out, rank, *(1 for _ in kernel)).to(dtype)
    return Module("lora", {"lora_down": down.contiguous(), "lora_up": up.contiguous()}, float(rank))


def reduced(svd: Svd, rule: Rule, kernel: tuple[int, ...], dtype: torch.dtype, total: float | None = None) -> Reduced:
    """The LoRA that `rule` makes of an SVD; `total` is ‖dW‖² where the SVD holds only its first values."""
    rank = chosen_rank(svd.s, rule, total)
    whole = float(svd.s.double().square().sum()) if total is None else total
    module = module_of(factors_from_svd(svd, rank), kernel, dtype)
    return Reduced(module, lost_energy(svd.s, rank, total), whole)


def kernel_of(place: ModulePath, module: Module, family: str) -> tuple[int, ...]:
    """Kernel size of the layer under a module; LoHa and LoKr without a core do not tell it, but the path does."""
    for slot in CORES:
        if slot in module.tensors and module.tensors[slot].dim() == 4:
            return tuple(module.tensors[slot].shape[2:])
    if module.kind == "lora" or place.component != "unet":
        return ()
    last = place.path.rpartition(".")[2]
    if last in CONV_3X3:
        return (3, 3)
    pointwise = last == "conv_shortcut" or (family == "sd1" and last in ("proj_in", "proj_out"))
    return (1, 1) if pointwise else ()


def dtype_of(module: Module) -> torch.dtype:
    """The widest type of the module's factors, at least half precision; magnitudes are kept in fp32 beside them."""
    own = [tensor.dtype for slot, tensor in module.tensors.items() if slot != "dora_scale"]
    dtypes = [dtype if dtype.itemsize > 1 else torch.float16 for dtype in own]
    found = dtypes[0]
    for dtype in dtypes[1:]:
        found = torch.promote_types(found, dtype)
    return found


def collect(modules: Mapping[ModulePath, Reduced], like: Adapter) -> Reduction:
    """The reduction of a whole adapter, in the family of `like` and without metadata."""
    lost: dict[str, float] = {}
    total: dict[str, float] = {}
    for place, one in modules.items():
        lost[place.block] = lost.get(place.block, 0.0) + one.lost
        total[place.block] = total.get(place.block, 0.0) + one.total
    errors = {block: math.sqrt(lost[block] / total[block]) if total[block] else 0.0 for block in sorted(total)}
    return Reduction(Adapter({place: one.module for place, one in modules.items()}, {}, like.family), errors)


def check_dora(name: str, adapter: Adapter, base: Weights | None) -> None:
    """Raises `Refused` where a module is a DoRA and there is no base, or one that it does not fit."""
    found = next((place for place, module in adapter.modules.items() if module.is_dora), None)
    if found and base is None:
        raise Refused(f"{name}: {found} is DoRA, whose change depends on its base; name it: --base FILE")
    if found and base:
        check_fit(name, adapter, base)


def check_finite(name: str, adapter: Adapter) -> None:
    """Raises `Refused` where a number of a module is not finite."""
    found = next((place for place, module in adapter.modules.items() if not module.is_finite), None)
    if found:
        raise Refused(f"{name}: {found} holds numbers that are not finite; nothing can be computed with it")


def check_biases(name: str, adapter: Adapter) -> None:
    """Raises `Refused` where a module changes a bias too, for which a LoRA has no place."""
    found = next((place for place, module in adapter.modules.items() if "diff_b" in module.tensors), None)
    if found:
        raise Refused(f"{name}: {found} changes a bias too (diff_b), which would be lost")
