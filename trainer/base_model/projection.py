"""Replace the 1 x 1 convolutions around transformer blocks with Linear layers."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


def project_tokens(unet: UNet2DConditionModel) -> int:
    """Replace frozen 1 x 1 convolutions before and after transformer blocks with Linear layers. Returns their number.

    This is the layout of SD 2. It avoids permuting the tokens, and matrix products of this size are faster than
    convolutions.
    """
    converted = 0
    for block in unet.modules():
        if isinstance(block, Transformer2DModel) and not block.use_linear_projection:
            projections: list[Any] = [block.proj_in, block.proj_out]
            if all(type(one) is torch.nn.Conv2d and not one.weight.requires_grad for one in projections):
                block.proj_in, block.proj_out = map(Projection, projections)
                block.use_linear_projection = True
                converted += 2
    return converted


class Projection(torch.nn.Linear):
    """A 1 x 1 convolution of tokens (…, in) as a Linear layer. A class of its own, so that it is not quantized."""

    def __init__(self, convolution: Any):
        super().__init__(convolution.in_channels, convolution.out_channels, device="meta")
        self.weight = torch.nn.Parameter(convolution.weight.detach().flatten(1), requires_grad=False)
        self.bias = convolution.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Makes tokens contiguous: with permuted ones, torch processes images one by one and copies the weight."""
        return super().forward(input.contiguous())
