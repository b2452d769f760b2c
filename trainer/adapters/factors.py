"""Modules <-> plain matrices: two factors, a reduction of them to a rank, and the error of that by block."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from scumble.configs.errors import Refused

from .adapter import Adapter, Module
from .keys import Place
from .lowrank import Factors, Rule, Svd, chosen_rank, factors_from_svd, lost_energy

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


def has_factors(module: Module) -> bool:
    """Whether the module is a LoRA, whose two factors are known without a decomposition."""
    return module.kind == "lora"


def factors_of(module: Module) -> Factors:
    """up (out, r) with the scale in it, and down (r, in · h · w) of a LoRA, in fp32; a Tucker core goes into down."""
    up, down = module.tensors["lora_up"].float().flatten(1), module.tensors["lora_down"].float()
    if "lora_mid" in module.tensors:
        down = torch.einsum("ijhw,jr->irhw", module.tensors["lora_mid"].float(), down.flatten(1))
    return Factors(module.scale * up, down.flatten(1))


def delta_shape(module: Module) -> tuple[int, int]:
    """(out, in · h · w) of dW; of a LoRA without computing it."""
    if not has_factors(module):
        out, inputs = module.delta().shape
        return out, inputs
    kernel = module.tensors.get("lora_mid", module.tensors["lora_down"]).shape[2:]
    return len(module.tensors["lora_up"]), module.tensors["lora_down"].shape[1] * math.prod(kernel)


def module_of(factors: Factors, kernel: tuple[int, ...], dtype: torch.dtype) -> Module:
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


def kernel_of(place: Place, module: Module, family: str) -> tuple[int, ...]:
    """Kernel size of the layer under a module; LoHa and LoKr without a core do not tell it, but the path does."""
    for slot in CORES:
        if slot in module.tensors and module.tensors[slot].dim() == 4:
            return tuple(module.tensors[slot].shape[2:])
    if has_factors(module) or place.component != "unet":
        return ()
    last = place.path.rpartition(".")[2]
    if last in CONV_3X3:
        return (3, 3)
    pointwise = last == "conv_shortcut" or (family == "sd1" and last in ("proj_in", "proj_out"))
    return (1, 1) if pointwise else ()


def dtype_of(module: Module) -> torch.dtype:
    """The widest type of the module's tensors."""
    dtypes = [tensor.dtype for tensor in module.tensors.values()]
    found = dtypes[0]
    for dtype in dtypes[1:]:
        found = torch.promote_types(found, dtype)
    return found


def collect(modules: Mapping[Place, Reduced], like: Adapter) -> Reduction:
    """The reduction of a whole adapter, in the family of `like` and without metadata."""
    lost: dict[str, float] = {}
    total: dict[str, float] = {}
    for place, one in modules.items():
        lost[place.block] = lost.get(place.block, 0.0) + one.lost
        total[place.block] = total.get(place.block, 0.0) + one.total
    errors = {block: math.sqrt(lost[block] / total[block]) if total[block] else 0.0 for block in sorted(total)}
    return Reduction(Adapter({place: one.module for place, one in modules.items()}, {}, like.family), errors)


def refuse_dora(name: str, adapter: Adapter) -> None:
    """Raises `Refused` where a module is a DoRA, whose change depends on the base's weights."""
    found = next((place for place, module in adapter.modules.items() if "dora_scale" in module.tensors), None)
    if found:
        raise Refused(
            f"{name}: {found.component} {found.path} is DoRA, which has no delta without its base; "
            "bake it into the base and extract a LoRA from the two"
        )
