"""LoRA on a frozen layer without elementwise passes: y = W x + b, then y += s · B (A x) in place.

Hu et al. 2021, equation 3, with hand-written gradients: for the gradient g of y, gx = g W + s · (g B) A,
gB = s · gᵀ (A x) and gA = s · (g B)ᵀ x, each product accumulated onto the one before. The factors are used in the dtype
of x, and their gradients are added directly to the fp32 `.grad` if it exists. Under torch.compile, which generates
better code, and on a quantized layer, plain operators compute the same. DoRA, LoHa and LoKr keep PEFT's forward.
`joint_linear` computes layers that share an input as one product.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

Lowered = Callable[[torch.nn.Parameter], torch.Tensor]


@dataclass(frozen=True)
class LoraFactors:
    """The factors A (`down`, (rank, in[, h, w])) and B (`up`, (out, rank[, 1, 1])) of one layer, trained in fp32.

    With copies in the dtype of the layer, the scale s and the dropout of the input.
    """

    down: torch.nn.Parameter
    up: torch.nn.Parameter
    low_down: torch.Tensor
    low_up: torch.Tensor
    scale: float
    dropout: torch.nn.Module


@dataclass(frozen=True)
class FastLora:
    """The forward of a layer. Looks up the base layer in each call, since it may be quantized during a run."""

    layer: Any
    factors: LoraFactors

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = self.layer.get_base_layer()
        if isinstance(base, torch.nn.Linear):
            return linear(base, self.factors, x)
        return convolution(base, self.factors, x)


def is_plain(layer: Any) -> bool:
    """Whether PEFT's layer is a LoRA on a Linear or Conv2d layer, without the magnitudes of DoRA."""
    return (
        isinstance(layer, LoraLayer)
        and isinstance(layer.get_base_layer(), torch.nn.Linear | torch.nn.Conv2d)
        and not hasattr(layer, "dora_scale")
    )


def use_fast_lora(layers: Iterable[Any], adapter: str, lowered: Lowered) -> bool:
    """Replace the forward of PEFT's plain LoRA layers. Returns whether all could be replaced; others need autocast.

    `lowered` returns the copy of a parameter in the dtype of the layer.
    """
    are_all_fast = True
    for layer in layers:
        if is_plain(layer):
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            scale, dropout = layer.scaling[adapter], layer.lora_dropout[adapter]
            layer.forward = FastLora(layer, LoraFactors(down, up, lowered(down), lowered(up), scale, dropout))
        else:
            are_all_fast = False
    return are_all_fast


def linear(base: torch.nn.Linear, factors: LoraFactors, x: torch.Tensor) -> torch.Tensor:
    """(…, in) -> (…, out)."""
    if _needs_plain_operators(base, factors):
        down, up = factors.down.to(x.dtype), factors.up.to(x.dtype)
        return base(x) + factors.scale * F.linear(F.linear(factors.dropout(x), down), up)
    return _Linear.apply(x, base.weight, base.bias, factors.down, factors.up, factors)


def joint_linear(layers: Sequence[Any], x: torch.Tensor) -> torch.Tensor | None:
    """Linear layers of the same input and shape as one product, (…, in) -> (…, layers, out).

    Returns None if a layer must be computed separately, or if the factors are not adjacent in memory, in the order of
    `memory_order`. Frozen weights that are not adjacent become slices of one tensor.
    """
    if not all(isinstance(layer.forward, FastLora) for layer in layers) or torch.compiler.is_compiling():
        return None
    bases = [layer.get_base_layer() for layer in layers]
    factors = [layer.forward.factors for layer in layers]
    if any(map(_needs_plain_operators, bases, factors)) or any(base.bias is not None for base in bases):
        return None
    if len({one.scale for one in factors}) > 1 or any(base.weight.requires_grad for base in bases):
        return None
    downs, ups = _stacked_view([one.low_down for one in factors]), _stacked_view([one.low_up for one in factors])
    if downs is None or ups is None:
        return None
    weight, trained = _merged_weights([base.weight for base in bases]), [one.down for one in factors]
    return _JointLinear.apply(x, weight, downs, ups, factors[0].scale, *trained, *(one.up for one in factors))


def _merged_weights(weights: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """Frozen matrices of the same shape as one matrix (layers · out, in), of which they become slices."""
    stacked = _stacked_view(weights)
    if stacked is None:
        merged = torch.nn.Parameter(torch.cat([weight.detach() for weight in weights]), requires_grad=False)
        for weight, rows in zip(weights, merged.detach().chunk(len(weights)), strict=True):
            weight.data = rows
        stacked = _stacked_view(weights)
        assert stacked is not None
    return stacked.flatten(0, 1)


def _stacked_view(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """A view (n, …) of n tensors of the same shape; None if they are not adjacent in memory."""
    first, storage = tensors[0].detach(), _storage_address(tensors[0])
    size, start = first.numel(), int(first.storage_offset())
    for index, tensor in enumerate(tensors):
        is_next = _storage_address(tensor) == storage and tensor.storage_offset() == start + index * size
        if not is_next or tensor.shape != first.shape or not tensor.is_contiguous():
            return None
    return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))


def _storage_address(tensor: torch.Tensor) -> int:
    """The address of the tensor's storage; 0 if the tensor has none or hides it."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def convolution(base: torch.nn.Conv2d, factors: LoraFactors, x: torch.Tensor) -> torch.Tensor:
    """(B, in, H, W) -> (B, out, H', W')."""
    geometry = base.stride, base.padding, base.dilation
    if _needs_plain_operators(base, factors):
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
        inner_grad = gradient @ factors.low_up  # without the scale
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (gradient @ weight).addmm_(inner_grad, factors.low_down, alpha=factors.scale).view(ctx.shape)
        down_grad = _given([factors.down], inner_grad.t(), rows, factors.scale)
        up_grad = _given([factors.up], gradient.t(), inner, factors.scale)
        return x_grad, None, None, *down_grad, *up_grad, None


class _JointLinear(torch.autograd.Function):
    """Like `_Linear`, for n layers: weight (n · out, in), downs (n, rank, in), ups (n, out, rank)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, downs: torch.Tensor, ups: torch.Tensor, scale: float,
        *trained: torch.nn.Parameter,
    ) -> torch.Tensor:  # fmt: skip
        rows, (n, width, _) = x.reshape(-1, x.shape[-1]), ups.shape
        inner = rows @ downs.flatten(0, 1).t()
        out = rows @ weight.t()
        _per_layer(out, n).baddbmm_(_per_layer(inner, n), ups.transpose(1, 2), alpha=scale)
        ctx.save_for_backward(rows, weight, downs, ups, inner)
        ctx.trained, ctx.scale, ctx.shape = trained, scale, x.shape
        return out.view(*x.shape[:-1], n, width)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, downs, ups, inner = ctx.saved_tensors
        n, scale = len(ups), ctx.scale
        gradient = gradients[0].reshape(len(rows), -1)
        inner_grad = torch.empty_like(inner)
        torch.bmm(_per_layer(gradient, n), ups, out=_per_layer(inner_grad, n))
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (gradient @ weight).addmm_(inner_grad, downs.flatten(0, 1), alpha=scale).view(ctx.shape)
        down_grads = _given(ctx.trained[:n], inner_grad.t(), rows, scale)
        up_grads = _given(ctx.trained[n:], _per_layer(gradient, n).transpose(1, 2), _per_layer(inner, n), scale)
        return x_grad, None, None, None, None, *down_grads, *up_grads


def _per_layer(rows: torch.Tensor, n: int) -> torch.Tensor:
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
        needs_x, pointwise = ctx.needs_input_grad[0], ((1, 1), (0, 0), (1, 1))
        inner_grad, up_grad = _conv_gradients(gradients[0], inner, factors.low_up, pointwise, (True, True))
        low_rank_x_grad, down_grad = _conv_gradients(inner_grad, x, factors.low_down, ctx.geometry, (needs_x, True))
        x_grad = None
        if needs_x:
            x_grad, _ = _conv_gradients(gradients[0], x, weight, ctx.geometry, (True, False))
            x_grad.add_(low_rank_x_grad, alpha=factors.scale)
        down_grad = _accumulate(factors.down, down_grad, factors.scale)
        up_grad = _accumulate(factors.up, up_grad, factors.scale)
        return x_grad, None, None, down_grad, up_grad, None, None


def _needs_plain_operators(base: torch.nn.Module, factors: LoraFactors) -> bool:
    """Whether dropout is active, the base is quantized, or torch.compile traces."""
    drops = factors.dropout.training and not isinstance(factors.dropout, torch.nn.Identity)
    return drops or type(base) not in (torch.nn.Linear, torch.nn.Conv2d) or torch.compiler.is_compiling()


def _given(
    parameters: Sequence[torch.nn.Parameter], left: torch.Tensor, right: torch.Tensor, scale: float
) -> list[torch.Tensor | None]:
    """Add s · left @ right, the stacked gradients of the parameters, to their `.grad` in place.

    Returns a gradient for each parameter without `.grad`, and None for the others.
    """
    existing = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = _stacked_view(existing) if len(existing) == len(parameters) else None
    if total is None:
        gradients = (left @ right).view(len(parameters), *parameters[0].shape)
        return [_accumulate(parameter, one, scale) for parameter, one in zip(parameters, gradients, strict=True)]
    total = total.view(*left.shape[:-1], right.shape[-1])
    if left.is_cuda and _adds_to_fp32(left.device, left.dtype):
        _add_product_to_fp32(total, left, right, scale)
    else:
        total.add_(left @ right, alpha=scale)
    return [None] * len(parameters)


def _accumulate(parameter: torch.nn.Parameter, gradient: torch.Tensor, scale: float) -> torch.Tensor | None:
    """Add s · gradient to the parameter's `.grad` in place, in one kernel with the cast; without `.grad`, return it."""
    if parameter.grad is None:
        return gradient.to(parameter.dtype).mul_(scale)
    parameter.grad.add_(gradient, alpha=scale)
    return None


def _add_product_to_fp32(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """total += s · left @ right for 16-bit factors. cuBLAS accumulates in fp32, in one kernel."""
    add = torch.addmm if left.ndim == 2 else torch.baddbmm
    add(total, left, right, out_dtype=torch.float32, alpha=scale, out=total)


@cache
def _adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch and the GPU support this, tested with small matrices. First called outside of a capture."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    total, left = torch.ones(16, 16, device=device), torch.full((16, 16), 0.5, device=device, dtype=dtype)
    try:
        _add_product_to_fp32(total, left, left, 2.0)
        _add_product_to_fp32(total[None], left[None], left[None], 2.0)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # torch before 2.8, or another backend
        return False
    return bool((total == 17.0).all())


def _conv_gradients(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: tuple[Any, ...], needed: tuple[bool, bool]
) -> tuple[Any, Any]:
    stride, padding, dilation = geometry
    x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [*needed, False]
    )
    return x_grad, weight_grad
