"""Pack the frozen weights of convolutions on a CPU once into oneDNN's layout, instead of in each step.

With small images and many channels, packing a weight takes as long as the convolution. The gradient of the input is
also a convolution: of the gradient of the output, with the weight flipped and its channels swapped (Dumoulin and Visin
2016, relationship 8). This takes memory for two more copies of each weight. Without gradients, as in previews, torch's
own convolution is used.
"""

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

MIN_WEIGHTS_PER_INPUT = 2  # below, converting the layout of the output takes longer than packing the weight
MAX_EXTRA_BYTES = 2**30
DTYPES = torch.float32, torch.bfloat16


def pack_convolutions(unet: torch.nn.Module) -> int:
    """Let the frozen convolutions of stride 1 use packed weights when gradients are needed; return their number.

    Does nothing if the copies take more than `MAX_EXTRA_BYTES`, or this torch lacks oneDNN.
    """
    chosen: list[Any] = [one for one in unet.modules() if isinstance(one, torch.nn.Conv2d) and can_be_packed(one)]
    extra = sum(2 * module.weight.nbytes for module in chosen)
    if not chosen or extra > MAX_EXTRA_BYTES or not is_available():
        return 0
    for module in chosen:
        module.forward = partial(_forward, module, PackedWeight(module))
    return len(chosen)


def can_be_packed(module: torch.nn.Conv2d) -> bool:
    """Whether it is a plain convolution, frozen, of stride 1 and on a CPU."""
    return (
        type(module) is torch.nn.Conv2d
        and module.weight.device.type == "cpu"
        and module.weight.dtype in DTYPES
        and not module.weight.requires_grad
        and (module.stride, module.dilation, module.groups) == ((1, 1), (1, 1), 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


class PackedWeight:
    """A convolution's weight (out, in, h, w), packed for each direction when that is first needed."""

    def __init__(self, module: torch.nn.Conv2d):
        self.module = module
        self.pad = [int(pad) for pad in module.padding]
        self.pad_back = [side - 1 - pad for side, pad in zip(module.kernel_size, self.pad, strict=True)]
        self.for_forward: torch.Tensor | None = None
        self.for_backward: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.for_forward is None:
            self.for_forward = packed(self.module.weight, self.pad, x.shape)
        return convolve(x, self.for_forward, self.module.bias, self.pad)

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.for_backward is None:
            with _disable_current_modes():
                flipped = self.module.weight.flip(2, 3).transpose(0, 1).contiguous()
            self.for_backward = packed(flipped, self.pad_back, gradient.shape)
        return convolve(gradient, self.for_backward, None, self.pad_back)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        ctx.weight = weight
        return weight.forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.weight.backward(gradients[0]), None


def _forward(module: torch.nn.Conv2d, weight: PackedWeight, x: torch.Tensor) -> torch.Tensor:
    pays = x.dtype == module.weight.dtype and module.weight.numel() >= MIN_WEIGHTS_PER_INPUT * x.numel()
    if pays and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Convolution.apply(x, weight)
    return torch.nn.Conv2d.forward(module, x)


def packed(weight: torch.Tensor, pad: list[int], shape: torch.Size) -> torch.Tensor:
    """An opaque copy for oneDNN: fastest for inputs of `shape` (B, in, H, W), correct for all.

    Without dispatch modes, so that a tape that is being recorded uses the copy instead of making it in each replay.
    """
    with _disable_current_modes():
        opaque = weight.detach().to_mkldnn()
        return torch.ops.aten.mkldnn_reorder_conv2d_weight(opaque, pad, [1, 1], [1, 1], 1, list(shape))


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pad: list[int]) -> torch.Tensor:
    """oneDNN returns channels_last; the operators that follow are faster on a contiguous tensor."""
    out = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, pad, [1, 1], [1, 1], 1, "none", [], "")
    return out.contiguous()


@cache
def is_available() -> bool:
    """Whether this torch has the two operators, which torch.compile also uses, and they compute a convolution."""
    if not torch.backends.mkldnn.is_available():
        return False
    ones, pad = torch.ones(1, 1, 3, 3), [1, 1]
    try:
        return torch.equal(convolve(ones, packed(ones, pad, ones.shape), None, pad), F.conv2d(ones, ones, None, 1, 1))
    except (AttributeError, RuntimeError):
        return False
