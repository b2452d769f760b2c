"""Quantize the Linear layers in the transformer blocks of a frozen UNet, with or without an adapter on top.

8 bits: round(127 · W / max |row|) with one scale per row (vector-wise, Dettmers et al. 2022). 4 bits: NF4 with
quantized scales (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), packed and unpacked by bitsandbytes. Weights are
dequantized for each forward and backward product, so activations keep the precision of the base and none are saved.
The 8-bit layer of bitsandbytes rounds its input and saves it, which defeats gradient checkpointing.
"""

from importlib.util import find_spec
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import UNAVAILABLE

from .projection import Projection

BITS = {"auto": 16, "off": 16, "int8": 8, "nf4": 4}  # at the start of a run


def check_bits(bits: int, device: str) -> None:
    """Raises `Refused` if 4 bits are not available: (69) without bitsandbytes, (2) on a device without support."""
    if bits == 4 and device == "mps":
        raise Refused("--base-quantization nf4: bitsandbytes does not support the mps device; use int8")
    if bits == 4 and find_spec("bitsandbytes") is None:
        raise Refused('--base-quantization nf4: requires bitsandbytes; pip install "scumble[quantize]"', UNAVAILABLE)


def fewer_bits(bits: int, device: str) -> int:
    """The next lower bit width of 16, 8 and 4, or 0 if this machine supports none."""
    if bits == 16:
        return 8
    return 4 if bits == 8 and device != "mps" and find_spec("bitsandbytes") else 0


def quantize(unet: UNet2DConditionModel, bits: int, device: torch.device, dense: UNet2DConditionModel) -> None:
    """Replace the Linear layers of `unet` one by one with those of `dense`, in 8 or 4 bits on `device`.

    `dense` may be `unet` itself. An adapter on `unet` does not change.
    """
    weights = {path.removesuffix(".base_layer"): path for path in _linears(dense)}
    for path in _linears(unet):
        layer = dense.get_submodule(weights[path.removesuffix(".base_layer")])
        assert isinstance(layer, torch.nn.Linear)
        parent, _, name = path.rpartition(".")
        setattr(unet.get_submodule(parent), name, QuantizedLinear(layer, bits, device))


class QuantizedLinear(torch.nn.Linear):
    """A frozen Linear layer with a quantized weight that computes in the dtype of the layer it replaces."""

    packed: torch.Tensor

    def __init__(self, dense: torch.nn.Linear, bits: int, device: torch.device):
        torch.nn.Module.__init__(self)  # PEFT sees a Linear, but the dense weight is not created
        self.in_features, self.out_features, self.dtype = dense.in_features, dense.out_features, dense.weight.dtype
        pack, self.unpack = PACKINGS[bits]
        packed, self.scales = pack(dense.weight.detach().to(device))
        self.register_buffer("packed", packed, persistent=False)
        self.bias = None if dense.bias is None else torch.nn.Parameter(dense.bias.detach().to(device), False)

    @property
    def weight(self) -> torch.Tensor:  # ty: ignore[incompatible-property-override]
        """(out, in) in `dtype`, dequantized on each access."""
        return self.unpack(self.packed, self.scales, self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _QuantizedProduct.apply(input, self)


def _to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """int8 weights (out, in) and fp32 scales (out, 1), one per row."""
    row_max = weight.float().abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight.float() * (127 / row_max)).round().to(torch.int8), row_max / 127


@torch.no_grad()
def _from_int8(packed: torch.Tensor, scales: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.mul(packed, scales, out=torch.empty(packed.shape, dtype=dtype, device=packed.device))


def _to_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Two weights per byte, and the quantization state of bitsandbytes, with 8-bit scales."""
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(weight, quant_type="nf4", compress_statistics=True)


def _from_nf4(packed: torch.Tensor, scales: Any, dtype: torch.dtype) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, scales)


PACKINGS = {8: (_to_int8, _from_int8), 4: (_to_nf4, _from_nf4)}


class _QuantizedProduct(torch.autograd.Function):
    """x W^T + b that saves neither x nor a dense W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        return torch.nn.functional.linear(input.to(layer.dtype), layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ ctx.layer.weight, None


def _linears(unet: UNet2DConditionModel) -> list[str]:
    """Paths of the frozen Linear layers in transformer blocks, without those of an adapter, which are trained."""
    return [
        path for path, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and not isinstance(module, Projection)
        and ".attentions." in path and not module.weight.requires_grad
    ]  # fmt: skip
