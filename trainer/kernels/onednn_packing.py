"""Frozen weights on a CPU, laid out once as oneDNN computes with them, not anew in each step: of convolutions, and of
the products of a recorded program in bf16.

Where pictures are small and channels are many, laying out a weight takes as long as the convolution does. The gradient
of the input is a convolution too: of the gradient of the output, with the weight turned about and its channels swapped
(Dumoulin and Visin 2016, relationship 8). Two more copies of each weight are kept; without gradients, as in previews,
torch's own convolution computes.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes

from .program import Product, Program

WEIGHTS_PER_INPUT = 2  # fewer, and what is saved is lost again in the layout of the output
MAX_EXTRA_BYTES = 2**30
DTYPES = torch.float32, torch.bfloat16
Convolve = Callable[[torch.Tensor], torch.Tensor]


def pack_convolutions(unet: torch.nn.Module) -> int:
    """Let frozen convolutions of stride 1 compute here when they have gradients to pass on; how many do.

    None where the copies take more than `MAX_EXTRA_BYTES`, or this torch has no oneDNN.
    """
    chosen: list[Any] = [one for one in unet.modules() if isinstance(one, torch.nn.Conv2d) and can_be_packed(one)]
    extra = sum(2 * module.weight.nbytes for module in chosen)
    if not chosen or extra > MAX_EXTRA_BYTES or not is_there():
        return 0
    for module in chosen:
        module.forward = partial(_forward, module, Packed(module))
    return len(chosen)


def can_be_packed(module: torch.nn.Conv2d) -> bool:
    """Whether it is plain, frozen, of stride 1 and on a CPU."""
    return (
        type(module) is torch.nn.Conv2d
        and module.weight.device.type == "cpu"
        and module.weight.dtype in DTYPES
        and not module.weight.requires_grad
        and (module.stride, module.dilation, module.groups) == ((1, 1), (1, 1), 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


class Packed:
    """A convolution's weight (out, in, h, w), laid out for its two directions when each is first wanted."""

    def __init__(self, module: torch.nn.Conv2d):
        self.module = module
        self.pad = [int(pad) for pad in module.padding]
        self.pad_back = [side - 1 - pad for side, pad in zip(module.kernel_size, self.pad, strict=True)]
        self.ways: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.module.weight
        if "forward" not in self.ways:
            self.ways["forward"] = laid_out(weight, self.pad, x.shape)
        return convolved(x, self.ways["forward"], self.module.bias, self.pad)

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        if "backward" not in self.ways:
            with _disable_current_modes():
                turned = self.module.weight.flip(2, 3).transpose(0, 1).contiguous()
            self.ways["backward"] = laid_out(turned, self.pad_back, gradient.shape)
        return convolved(gradient, self.ways["backward"], None, self.pad_back)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        ctx.packed = packed
        return packed.forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.packed.backward(gradients[0]), None


def _forward(module: torch.nn.Conv2d, packed: Packed, x: torch.Tensor) -> torch.Tensor:
    fits = x.dtype == module.weight.dtype and module.weight.numel() >= WEIGHTS_PER_INPUT * x.numel()
    if fits and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Convolution.apply(x, packed)
    return torch.nn.Conv2d.forward(module, x)


def laid_out(weight: torch.Tensor, pad: list[int], shape: torch.Size) -> torch.Tensor:
    """An opaque copy for oneDNN, best for inputs of `shape` (B, in, H, W) and right for all; no part of a recording."""
    with _disable_current_modes():
        opaque = weight.detach().to_mkldnn()
        return torch.ops.aten.mkldnn_reorder_conv2d_weight(opaque, pad, [1, 1], [1, 1], 1, list(shape))


def convolved(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pad: list[int]) -> torch.Tensor:
    """oneDNN gives channels_last; what comes next on a CPU is faster otherwise."""
    out = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, pad, [1, 1], [1, 1], 1, "none", [], "")
    return out.contiguous()


def pack_products(program: Program) -> None:
    """Let oneDNN compute products with frozen matrices, at the same numbers, with biases that cost nothing more."""
    packed: dict[Node, Node] = {}
    for product in filter(None, map(Product.of, program.calls)):
        right, left = product.right, program.places.get(product.left)
        if (
            left is not None
            and left.layout.is_in_rows
            and can_pack(left.layout.dtype)
            and program.has_fixed_sides(product)
            and program.is_frozen(right)
        ):
            weight = program.constants[right].detach()
            if right not in packed and program.room.takes(weight.nbytes):
                opaque = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), left.layout.size[0])
                packed[right] = program.constant(opaque)
            if right in packed:
                product.node.target = torch.ops.mkldnn._linear_pointwise.default
                product.node.args = product.left, packed[right], product.bias, "none", [], ""


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's products for a matrix that was laid out before. In bf16 its others are, too."""
    if dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    ones = torch.ones(2, 2, dtype=dtype)
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(ones, 2)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(ones, weight, None, "none", [], ""), ones @ ones)
    except (AttributeError, RuntimeError):
        return False


@cache
def is_there() -> bool:
    """Whether this torch has the two operators, which torch.compile is built on, and they compute a convolution."""
    if not torch.backends.mkldnn.is_available():
        return False
    ones = torch.ones(1, 1, 3, 3)
    try:
        return torch.equal(
            convolved(ones, laid_out(ones, [1, 1], ones.shape), None, [1, 1]), F.conv2d(ones, ones, None, 1, 1)
        )
    except (AttributeError, RuntimeError):
        return False
