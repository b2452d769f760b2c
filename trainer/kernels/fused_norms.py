"""Fused Triton kernels for group norm with SiLU and for GEGLU in a frozen UNet: fewer passes over memory.

torch's group norm supports channels_last only on a CPU. On CUDA it converts images to contiguous first, and the next
convolution converts them back; norm and SiLU both store their inputs for the backward pass. `triton_kernels` work on
channels_last and store only the input of the norm.
"""

from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def fuse(unet: UNet2DConditionModel) -> str:
    """Use the fused kernels in a UNet with frozen norms. Returns "", or the reason why they cannot be used."""
    if reason := why_not(unet.device, unet.dtype):
        return reason
    forwards: Any = {GEGLU: _geglu, torch.nn.GroupNorm: group_norm, ResnetBlock2D: _resnet}
    for module in unet.modules():
        if type(module) in forwards and (not isinstance(module, ResnetBlock2D) or _is_plain(module)):
            module.forward = partial(forwards[type(module)], module)
    return ""


@cache
def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels cannot be used on this device; "" if they match torch. Compiles them, once per machine: 4 s."""
    try:
        import_module("scumble.trainer.kernels.triton_kernels")
        return "" if _matches_torch(device, dtype) else "their results differ from torch's"
    except torch.OutOfMemoryError:
        raise
    except ImportError:
        return "Triton is not installed"
    except Exception as error:  # noqa: BLE001 - no C compiler, an unknown GPU, an error in Triton
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def group_norm(norm: Any, x: torch.Tensor, shift: torch.Tensor | None = None, silu: bool = False) -> torch.Tensor:
    """The GroupNorm of x + shift, (B, C, H, W) and (B, C), optionally followed by SiLU."""
    if shift is not None and shift.requires_grad:
        x, shift = x + shift[:, :, None, None], None
    if x.ndim != 4 or norm.weight.requires_grad:
        shifted = x if shift is None else x + shift[:, :, None, None]
        out = F.group_norm(shifted, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return F.silu(out) if silu else out
    return _GroupNorm.apply(x, shift, norm, silu)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shift: torch.Tensor | None, norm: Any, silu: bool) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        shift = None if shift is None else shift.expand(len(x), -1).contiguous()
        y, moments = _kernels().group_norm(x, shift, norm.num_groups, norm.weight, norm.bias, norm.eps, silu)
        ctx.save_for_backward(x, shift, norm.weight, norm.bias, moments)
        ctx.groups, ctx.silu = norm.num_groups, silu
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, shift, weight, bias, moments = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        x_grad = _kernels().group_norm_backward(gradient, x, shift, ctx.groups, weight, bias, moments, ctx.silu)
        return x_grad, None, None, None


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joint: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(joint)
        return _kernels().geglu(joint)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return _kernels().geglu_backward(gradients[0].contiguous(), *ctx.saved_tensors)


def _geglu(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """(…, in) -> (…, out); by diffusers' own code while torch.compile traces."""
    if torch.compiler.is_compiling():
        return GEGLU.forward(module, hidden)
    joint = module.proj(hidden)
    return _Geglu.apply(joint.flatten(0, -2).contiguous()).view(*joint.shape[:-1], -1)


def _is_plain(block: ResnetBlock2D) -> bool:
    """Whether the block uses only the features that SD's UNets need."""
    has_more = block.up or block.down or block.skip_time_act or block.output_scale_factor != 1
    return not has_more and block.time_embedding_norm == "default" and isinstance(block.nonlinearity, torch.nn.SiLU)


def _resnet(block: Any, x: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
    """(B, in, H, W) -> (B, out, H, W). As in diffusers, but the first convolution's bias is added to the time
    embedding."""
    shift = None if temb is None or block.time_emb_proj is None else block.time_emb_proj(F.silu(temb))
    first, hidden = block.conv1, group_norm(block.norm1, x, silu=True)
    if type(first) is torch.nn.Conv2d and first.bias is not None and shift is not None:
        hidden = first._conv_forward(hidden, first.weight, None)
        shift = shift + first.bias
    else:
        hidden = first(hidden)
    hidden = block.conv2(block.dropout(group_norm(block.norm2, hidden, shift, silu=True)))
    return (x if block.conv_shortcut is None else block.conv_shortcut(x)) + hidden


def _matches_torch(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether outputs and gradients of all compiled variants match torch on small tensors."""
    results = []
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 40, 20, 20), (2, 40, 20, 20), (5, 80), (5, 40), (2, 40)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    image, image_grad, joint, gated_grad, affine = tensors
    norm = torch.nn.GroupNorm(2, 40, device=device, dtype=dtype).requires_grad_(False)
    norm.weight.copy_(affine[0]), norm.bias.copy_(affine[1])
    image, image_grad = (one.contiguous(memory_format=torch.channels_last) for one in (image, image_grad))
    for is_fused in (True, False):
        x, both = image.clone().requires_grad_(True), joint.clone().requires_grad_(True)
        hidden, gate = both.chunk(2, -1)
        outs = [_Geglu.apply(both) if is_fused else hidden * F.gelu(gate)]
        for shift, silu in ((image_grad[:, :, 0, 0], True), (None, True), (None, False)):
            if is_fused:
                outs.append(group_norm(norm, x, shift, silu))
            else:
                plain = norm(x if shift is None else x + shift[:, :, None, None])
                outs.append(F.silu(plain) if silu else plain)
        torch.autograd.backward(outs, (gated_grad, image_grad, image_grad, image_grad))
        results.append((*outs, x.grad, both.grad))
    limit = TOLERANCE[dtype]
    return all(bool(((a - b).abs() <= limit * (1 + b.abs())).all()) for a, b in zip(*results, strict=True))


def _kernels() -> Any:
    return import_module("scumble.trainer.kernels.triton_kernels")
