"""1 x 1 convolutions around transformer blocks as Linear layers."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


def project_tokens(unet: UNet2DConditionModel) -> int:
    """Let frozen 1 x 1 convolutions before and after transformer blocks be the same as Linear layers, as SD 2 has them:
    tokens need no turning, and products of this size are quicker than convolutions. How many became so."""
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
    """A 1 x 1 convolution, of tokens (…, in); not plainly a Linear layer, so that it is never quantised, as it was."""

    def __init__(self, convolution: Any):
        super().__init__(convolution.in_channels, convolution.out_channels, device="meta")
        self.weight = torch.nn.Parameter(convolution.weight.detach().flatten(1), requires_grad=False)
        self.bias = convolution.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Of tokens in order: of turned ones torch computes each picture by itself, with a copy of the weight."""
        return super().forward(input.contiguous())
