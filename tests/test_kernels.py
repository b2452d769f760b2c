"""Projections of tokens as Linear layers, against diffusers' own convolutions."""

from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from scumble.trainer.kernels import project_tokens


def unet(linear: bool = False) -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=24,
        attention_head_dim=4, norm_num_groups=8, use_linear_projection=linear,
    ).requires_grad_(False)  # fmt: skip


def passed(model: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output of a pass, and its gradients to picture and text."""
    torch.manual_seed(1)
    x, text = (torch.randn(2, 4, 8, 8).requires_grad_(True), torch.randn(2, 7, 24).requires_grad_(True))
    out = model.to(dtype)(x.to(dtype), torch.tensor([3, 700]), text.to(dtype)).sample.float()
    out.square().sum().backward()
    assert x.grad is not None and text.grad is not None
    return [out.detach(), x.grad, text.grad]


def test_outputs_and_gradients_are_those_of_the_convolutions():
    theirs, ours = unet(), unet()
    assert project_tokens(ours) == 8  # before and after four blocks
    assert not any(isinstance(one, torch.nn.Conv2d) for name, one in ours.named_modules() if "proj_" in name)
    exact = passed(theirs, torch.float32)
    for one, other in zip(passed(ours, torch.float32), exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for ours_, theirs_, right in zip(passed(ours, torch.bfloat16), passed(theirs, torch.bfloat16), exact, strict=True):
        assert (ours_ - right).norm() < 1.5 * (theirs_ - right).norm()  # in bf16 no further from that


def test_what_learns_or_has_an_adapter_and_what_is_linear_already_stays():
    learns = unet()
    learns.mid_block.attentions[0].proj_in.requires_grad_(True)
    assert project_tokens(learns) == 6
    adapted = unet()
    block = adapted.mid_block.attentions[0]
    block.proj_out = torch.nn.Sequential(block.proj_out)
    assert project_tokens(adapted) == 6 and not block.use_linear_projection
    assert project_tokens(unet(linear=True)) == 0
