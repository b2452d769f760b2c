"""LoRA's product on a frozen layer without elementwise passes: y = W x + b, then y += s · B (A x) in place.

Hu et al. 2021, equation 3, with its gradients by hand: for g of y, gx = g W + s · (g B) A, gB = s · gᵀ (A x),
gA = s · (g B)ᵀ x, each one product onto the one before. The factors are used in the dtype of x; their gradients are
added straight to fp32 `.grad` where that is there. Under torch.compile, which writes better passes itself, and on a
quantised layer the same is written plainly. PEFT's own forward stays for DoRA, LoHa and LoKr. Layers of one input can
be one product: `Together`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from .program import memory_of

Lowered = Callable[[torch.nn.Parameter], torch.Tensor]


@dataclass(frozen=True)
class Factors:
    """A and B of one layer as trained, fp32 (rank, in[, h, w]) and (out, rank[, 1, 1]), their copies in the dtype of
    the layer, s, and the share of inputs that is dropped."""

    down: torch.nn.Parameter
    up: torch.nn.Parameter
    low_down: torch.Tensor
    low_up: torch.Tensor
    scale: float
    dropout: torch.nn.Module


@dataclass(frozen=True)
class Fast:
    """What a layer computes. Its base is asked for each time, since it may be quantised while a run lasts."""

    layer: Any
    factors: Factors

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


def speed_up(layers: Iterable[Any], adapter: str, lowered: Lowered) -> bool:
    """Let PEFT's layers compute their outputs here; whether all do. Others stay as they are, and want autocast.

    `lowered` gives a parameter's copy in the dtype of the layer.
    """
    everything = True
    for layer in layers:
        if is_plain(layer):
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            scale, dropout = layer.scaling[adapter], layer.lora_dropout[adapter]
            layer.forward = Fast(layer, Factors(down, up, lowered(down), lowered(up), scale, dropout))
        else:
            everything = False
    return everything


def linear(base: torch.nn.Linear, factors: Factors, x: torch.Tensor) -> torch.Tensor:
    """(…, in) -> (…, out)."""
    if _wants_plain(base, factors):
        down, up = factors.down.to(x.dtype), factors.up.to(x.dtype)
        return base(x) + factors.scale * F.linear(F.linear(factors.dropout(x), down), up)
    return _Linear.apply(x, base.weight, base.bias, factors.down, factors.up, factors)


class Together:
    """Linear layers of one input as one product; their frozen weights become parts of one, (sum of out, in)."""

    def __init__(self) -> None:
        self.weight: torch.nn.Parameter | None = None

    def __call__(self, layers: Sequence[Any], x: torch.Tensor) -> torch.Tensor | None:
        """(…, in) -> (…, sum of out); None where one of them has to compute by itself."""
        if not all(isinstance(layer.forward, Fast) for layer in layers) or torch.compiler.is_compiling():
            return None
        bases = [layer.get_base_layer() for layer in layers]
        factors = [layer.forward.factors for layer in layers]
        if any(map(_wants_plain, bases, factors)) or any(base.bias is not None for base in bases):
            self.weight = None  # a base that was quantised has no use for it
            return None
        if len({one.scale for one in factors}) > 1 or any(base.weight.requires_grad for base in bases):
            return None
        weights = [base.weight for base in bases]
        if self.weight is None or any(memory_of(one) != memory_of(self.weight) for one in weights):
            self.weight = torch.nn.Parameter(torch.cat([one.detach() for one in weights]), requires_grad=False)
            for one, rows in zip(weights, self.weight.detach().split([len(one) for one in weights]), strict=True):
                one.data = rows
        return _Linears.apply(x, self.weight, factors, *(p for one in factors for p in (one.down, one.up)))


def convolution(base: torch.nn.Conv2d, factors: Factors, x: torch.Tensor) -> torch.Tensor:
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
        down: torch.nn.Parameter, up: torch.nn.Parameter, factors: Factors,
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
        factors: Factors = ctx.factors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        before = gradient @ factors.low_up  # the gradient of `inner`, but for the scale
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight).addmm_(before, factors.low_down, alpha=factors.scale).view(ctx.shape)
        of_down = _given(factors.down, before.t() @ rows, factors.scale)
        of_up = _given(factors.up, gradient.t() @ inner, factors.scale)
        return of_x, None, None, of_down, of_up, None


class _Linears(torch.autograd.Function):
    """As `_Linear`, with A of all layers above each other, and B of each where its outputs are, else 0."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, factors: Sequence[Factors], *trained: torch.nn.Parameter
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        downs = torch.cat([one.low_down for one in factors])
        ups = torch.block_diag(*(one.low_up for one in factors))
        inner = rows @ downs.t()
        out = (rows @ weight.t()).addmm_(inner, ups.t(), alpha=factors[0].scale)
        ctx.save_for_backward(rows, weight, inner, downs, ups)
        ctx.factors, ctx.shape = factors, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, inner, downs, ups = ctx.saved_tensors
        factors: Sequence[Factors] = ctx.factors
        gradient, scale = gradients[0].reshape(-1, gradients[0].shape[-1]), factors[0].scale
        before = gradient @ ups
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight).addmm_(before, downs, alpha=scale).view(ctx.shape)
        ranks, widths = [len(one.low_down) for one in factors], [len(one.low_up) for one in factors]
        parts = zip(factors, before.split(ranks, 1), inner.split(ranks, 1), gradient.split(widths, 1), strict=True)
        given: list[torch.Tensor | None] = []
        for one, before_one, inner_one, gradient_one in parts:
            given.append(_given(one.down, before_one.t() @ rows, scale))
            given.append(_given(one.up, gradient_one.t() @ inner_one, scale))
        return of_x, None, None, *given


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        down: torch.nn.Parameter, up: torch.nn.Parameter, factors: Factors, geometry: tuple[Any, ...],
    ) -> torch.Tensor:  # fmt: skip
        inner = F.conv2d(x, factors.low_down, None, *geometry)
        out = F.conv2d(x, weight, bias, *geometry).add_(F.conv2d(inner, factors.low_up), alpha=factors.scale)
        ctx.save_for_backward(x, weight, inner)
        ctx.factors, ctx.geometry = factors, geometry
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inner = ctx.saved_tensors
        factors: Factors = ctx.factors
        needs_x, one = ctx.needs_input_grad[0], ((1, 1), (0, 0), (1, 1))
        before, of_up = _conv_gradients(gradients[0], inner, factors.low_up, one, (True, True))
        through, of_down = _conv_gradients(before, x, factors.low_down, ctx.geometry, (needs_x, True))
        of_x = None
        if needs_x:
            of_x, _ = _conv_gradients(gradients[0], x, weight, ctx.geometry, (True, False))
            of_x.add_(through, alpha=factors.scale)
        of_down, of_up = _given(factors.down, of_down, factors.scale), _given(factors.up, of_up, factors.scale)
        return of_x, None, None, of_down, of_up, None, None


def _wants_plain(base: torch.nn.Module, factors: Factors) -> bool:
    """Whether inputs are dropped, the base is quantised and computes by itself, or a compiler looks on."""
    drops = factors.dropout.training and not isinstance(factors.dropout, torch.nn.Identity)
    return drops or type(base) not in (torch.nn.Linear, torch.nn.Conv2d) or torch.compiler.is_compiling()


def _given(parameter: torch.nn.Parameter, gradient: torch.Tensor, scale: float) -> torch.Tensor | None:
    """Add s · gradient to the parameter's own in place (one kernel, cast and all); where it has none, return it."""
    if parameter.grad is None:
        return gradient.to(parameter.dtype).mul_(scale)
    parameter.grad.add_(gradient, alpha=scale)
    return None


def _conv_gradients(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: tuple[Any, ...], wanted: tuple[bool, bool]
) -> tuple[Any, Any]:
    stride, padding, dilation = geometry
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [*wanted, False]
    )
    return of_x, of_weight
