"""LoRA's product on a frozen layer without elementwise passes: y = W x + b, then y += s · B (A x) in place.

Hu et al. 2021, equation 3, with its gradients by hand: for g of y, gx = g W + s · (g B) A, gB = s · gᵀ (A x),
gA = s · (g B)ᵀ x, each one product onto the one before. The factors are used in the dtype of x; their gradients are
added straight to fp32 `.grad` where that is there. Under torch.compile, which writes better passes itself, and on a
quantised layer the same is written plainly. PEFT's own forward stays for DoRA, LoHa and LoKr. Layers of one input can
be one product: `joint_linear`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from .tensor_memory import memory_of

Lowered = Callable[[torch.nn.Parameter], torch.Tensor]


@dataclass(frozen=True)
class LoraFactors:
    """A and B of one layer as trained, fp32 (rank, in[, h, w]) and (out, rank[, 1, 1]), their copies in the dtype of
    the layer, s, and the share of inputs that is dropped."""

    down: torch.nn.Parameter
    up: torch.nn.Parameter
    low_down: torch.Tensor
    low_up: torch.Tensor
    scale: float
    dropout: torch.nn.Module


@dataclass(frozen=True)
class FastLora:
    """What a layer computes. Its base is asked for each time, since it may be quantised while a run lasts."""

    layer: Any
    factors: LoraFactors

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = self.layer.get_base_layer()
        if isinstance(base, torch.nn.Linear):
            return linear(base, self.factors, x)
        return convolution(base, self.factors, x)


def is_plain(layer: Any) -> bool:
    """Whether PEFT's layer is a LoRA on a Linear or a convolution, with no magnitudes."""
    return (
        isinstance(layer, LoraLayer)
        and isinstance(layer.get_base_layer(), torch.nn.Linear | torch.nn.Conv2d)
        and not hasattr(layer, "dora_scale")
    )


def use_fast_lora(layers: Iterable[Any], adapter: str, lowered: Lowered) -> bool:
    """Let PEFT's layers compute their outputs here; whether all do. Others stay as they are, and want autocast.

    `lowered` gives a parameter's copy in the dtype of the layer.
    """
    everything = True
    for layer in layers:
        if is_plain(layer):
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            scale, dropout = layer.scaling[adapter], layer.lora_dropout[adapter]
            layer.forward = FastLora(layer, LoraFactors(down, up, lowered(down), lowered(up), scale, dropout))
        else:
            everything = False
    return everything


def linear(base: torch.nn.Linear, factors: LoraFactors, x: torch.Tensor) -> torch.Tensor:
    """(…, in) -> (…, out)."""
    if _wants_plain(base, factors):
        down, up = factors.down.to(x.dtype), factors.up.to(x.dtype)
        return base(x) + factors.scale * F.linear(F.linear(factors.dropout(x), down), up)
    return _Linear.apply(x, base.weight, base.bias, factors.down, factors.up, factors)


def joint_linear(layers: Sequence[Any], x: torch.Tensor) -> torch.Tensor | None:
    """Linear layers of one input and one shape as one product, (…, in) -> (…, layers, out), where their factors lie one
    behind the other as `lora.laid_out` has them; None where one of them has to compute by itself. Frozen weights that
    do not lie so become parts of one."""
    if not all(isinstance(layer.forward, FastLora) for layer in layers) or torch.compiler.is_compiling():
        return None
    bases = [layer.get_base_layer() for layer in layers]
    factors = [layer.forward.factors for layer in layers]
    if any(map(_wants_plain, bases, factors)) or any(base.bias is not None for base in bases):
        return None
    if len({one.scale for one in factors}) > 1 or any(base.weight.requires_grad for base in bases):
        return None
    downs, ups = _in_a_row([one.low_down for one in factors]), _in_a_row([one.low_up for one in factors])
    if downs is None or ups is None:
        return None
    weight, trained = _joined([base.weight for base in bases]), [one.down for one in factors]
    return _Linears.apply(x, weight, downs, ups, factors[0].scale, *trained, *(one.up for one in factors))


def _joined(weights: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """Frozen matrices of one shape as one, (sum of out, in), of which they are parts from now on."""
    whole = _in_a_row(weights)
    if whole is None:
        rows = torch.nn.Parameter(torch.cat([one.detach() for one in weights]), requires_grad=False)
        for one, part in zip(weights, rows.detach().chunk(len(weights)), strict=True):
            one.data = part
        whole = _in_a_row(weights)
        assert whole is not None
    return whole.flatten(0, 1)


def _in_a_row(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Tensors of one shape as one (n, …), a view of them; None where they do not lie one behind the other."""
    first, memory = tensors[0].detach(), memory_of(tensors[0])
    size, start = first.numel(), int(first.storage_offset())
    for number, one in enumerate(tensors):
        is_next = memory_of(one) == memory and one.storage_offset() == start + number * size
        if not is_next or one.shape != first.shape or not one.is_contiguous():
            return None
    return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))


def convolution(base: torch.nn.Conv2d, factors: LoraFactors, x: torch.Tensor) -> torch.Tensor:
    """(B, in, H, W) -> (B, out, H', W')."""
    geometry = base.stride, base.padding, base.dilation
    if _wants_plain(base, factors):
        down, up = factors.down.to(x.dtype), factors.up.to(x.dtype)
        return base(x) + factors.scale * F.conv2d(F.conv2d(factors.dropout(x), down, None, *geometry), up)
    return _Convolution.apply(x, base.weight, base.bias, factors.down, factors.up, factors, geometry)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        down: torch.nn.Parameter, up: torch.nn.Parameter, factors: LoraFactors,
    ) -> torch.Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ factors.low_down.t()
        out = F.linear(rows, weight, bias).addmm_(inner, factors.low_up.t(), alpha=factors.scale)
        ctx.save_for_backward(rows, weight, inner)
        ctx.factors, ctx.shape = factors, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, inner = ctx.saved_tensors
        factors: LoraFactors = ctx.factors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        before = gradient @ factors.low_up  # the gradient of `inner`, but for the scale
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight).addmm_(before, factors.low_down, alpha=factors.scale).view(ctx.shape)
        of_down = _given([factors.down], before.t(), rows, factors.scale)
        of_up = _given([factors.up], gradient.t(), inner, factors.scale)
        return of_x, None, None, *of_down, *of_up, None


class _Linears(torch.autograd.Function):
    """As `_Linear`, for n layers: weight (n · out, in), downs (n, rank, in), ups (n, out, rank)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, downs: torch.Tensor, ups: torch.Tensor, scale: float,
        *trained: torch.nn.Parameter,
    ) -> torch.Tensor:  # fmt: skip
        rows, (n, width, _) = x.reshape(-1, x.shape[-1]), ups.shape
        inner = rows @ downs.flatten(0, 1).t()
        out = rows @ weight.t()
        _of_each(out, n).baddbmm_(_of_each(inner, n), ups.transpose(1, 2), alpha=scale)
        ctx.save_for_backward(rows, weight, downs, ups, inner)
        ctx.trained, ctx.scale, ctx.shape = trained, scale, x.shape
        return out.view(*x.shape[:-1], n, width)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, downs, ups, inner = ctx.saved_tensors
        n, scale = len(ups), ctx.scale
        gradient = gradients[0].reshape(len(rows), -1)
        before = torch.empty_like(inner)
        torch.bmm(_of_each(gradient, n), ups, out=_of_each(before, n))
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight).addmm_(before, downs.flatten(0, 1), alpha=scale).view(ctx.shape)
        of_downs = _given(ctx.trained[:n], before.t(), rows, scale)
        of_ups = _given(ctx.trained[n:], _of_each(gradient, n).transpose(1, 2), _of_each(inner, n), scale)
        return of_x, None, None, None, None, *of_downs, *of_ups


def _of_each(rows: torch.Tensor, n: int) -> torch.Tensor:
    """(rows, n · width) -> (n, rows, width), a view."""
    return rows.view(len(rows), n, -1).transpose(0, 1)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        down: torch.nn.Parameter, up: torch.nn.Parameter, factors: LoraFactors, geometry: tuple[Any, ...],
    ) -> torch.Tensor:  # fmt: skip
        inner = F.conv2d(x, factors.low_down, None, *geometry)
        out = F.conv2d(x, weight, bias, *geometry).add_(F.conv2d(inner, factors.low_up), alpha=factors.scale)
        ctx.save_for_backward(x, weight, inner)
        ctx.factors, ctx.geometry = factors, geometry
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inner = ctx.saved_tensors
        factors: LoraFactors = ctx.factors
        needs_x, one = ctx.needs_input_grad[0], ((1, 1), (0, 0), (1, 1))
        before, of_up = _conv_gradients(gradients[0], inner, factors.low_up, one, (True, True))
        through, of_down = _conv_gradients(before, x, factors.low_down, ctx.geometry, (needs_x, True))
        of_x = None
        if needs_x:
            of_x, _ = _conv_gradients(gradients[0], x, weight, ctx.geometry, (True, False))
            of_x.add_(through, alpha=factors.scale)
        of_down, of_up = _added(factors.down, of_down, factors.scale), _added(factors.up, of_up, factors.scale)
        return of_x, None, None, of_down, of_up, None, None


def _wants_plain(base: torch.nn.Module, factors: LoraFactors) -> bool:
    """Whether inputs are dropped, the base is quantised and computes by itself, or a compiler looks on."""
    drops = factors.dropout.training and not isinstance(factors.dropout, torch.nn.Identity)
    return drops or type(base) not in (torch.nn.Linear, torch.nn.Conv2d) or torch.compiler.is_compiling()


def _given(
    parameters: Sequence[torch.nn.Parameter], left: torch.Tensor, right: torch.Tensor, scale: float
) -> list[torch.Tensor | None]:
    """Add s · left @ right, which is the gradient of all of the parameters, to their own in place; or return it in
    parts, where they have none."""
    own = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = _in_a_row(own) if len(own) == len(parameters) else None
    if total is None:
        parts = (left @ right).view(len(parameters), *parameters[0].shape)
        return [_added(parameter, part, scale) for parameter, part in zip(parameters, parts, strict=True)]
    total = total.view(*left.shape[:-1], right.shape[-1])
    if left.is_cuda and _adds_to_fp32(left.device, left.dtype):
        _add_product_to_fp32(total, left, right, scale)
    else:
        total.add_(left @ right, alpha=scale)
    return [None] * len(parameters)


def _added(parameter: torch.nn.Parameter, gradient: torch.Tensor, scale: float) -> torch.Tensor | None:
    """Add s · gradient to the parameter's own in place (one kernel, cast and all); where it has none, return it."""
    if parameter.grad is None:
        return gradient.to(parameter.dtype).mul_(scale)
    parameter.grad.add_(gradient, alpha=scale)
    return None


def _add_product_to_fp32(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """total += s · left @ right, of factors in 16 bits, as cuBLAS adds up: in fp32, in one kernel."""
    add = torch.addmm if left.ndim == 2 else torch.baddbmm
    add(total, left, right, out_dtype=torch.float32, alpha=scale, out=total)


@cache
def _adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch and the card can, seen by a small one; asked first in a pass that is not captured."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    total, left = torch.ones(16, 16, device=device), torch.full((16, 16), 0.5, device=device, dtype=dtype)
    try:
        _add_product_to_fp32(total, left, left, 2.0)
        _add_product_to_fp32(total[None], left[None], left[None], 2.0)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # torch before 2.8, or built for something else
        return False
    return bool((total == 17.0).all())


def _conv_gradients(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: tuple[Any, ...], wanted: tuple[bool, bool]
) -> tuple[Any, Any]:
    stride, padding, dilation = geometry
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [*wanted, False]
    )
    return of_x, of_weight
