"""Group norms with SiLU, and GEGLU, of a frozen UNet by our own kernels: fewer passes, and less kept for the backward.

torch's group norm knows channels last on a CPU only: on CUDA it turns pictures round before it, and convolutions turn
them back behind it; and both it and SiLU keep what they are given. `triton_kernels` read what is there, and only the
norm's input is kept.
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
    """Let a UNet whose norms are frozen compute so; why not, where Triton is not there or does not compute."""
    if reason := why_not(unet.device, unet.dtype):
        return reason
    ours: Any = {GEGLU: _geglu, torch.nn.GroupNorm: normalized, ResnetBlock2D: _resnet}
    for module in unet.modules():
        if type(module) in ours and (not isinstance(module, ResnetBlock2D) or _is_plain(module)):
            module.forward = partial(ours[type(module)], module)
    return ""


@cache
def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels do not give what torch does there; "" where they do. Compiles them, once a machine: some 4 s."""
    try:
        import_module("scumble.trainer.kernels.triton_kernels")
        return "" if _is_right(device, dtype) else "they give other numbers than torch's"
    except torch.OutOfMemoryError:
        raise
    except ImportError:
        return "there is no Triton"
    except Exception as error:  # noqa: BLE001 - no C compiler, an unknown card, Triton's own
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def normalized(norm: Any, x: torch.Tensor, shift: torch.Tensor | None = None, silu: bool = False) -> torch.Tensor:
    """A GroupNorm of x + shift, (B, C, H, W) and (B, C), with SiLU behind it or not."""
    if shift is not None and shift.requires_grad:
        x, shift = x + shift[:, :, None, None], None
    if x.ndim != 4 or norm.weight.requires_grad:
        given = x if shift is None else x + shift[:, :, None, None]
        out = F.group_norm(given, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return F.silu(out) if silu else out
    return _Normalized.apply(x, shift, norm, silu)


class _Normalized(torch.autograd.Function):
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
        of_x = _kernels().group_norm_backward(gradient, x, shift, ctx.groups, weight, bias, moments, ctx.silu)
        return of_x, None, None, None


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joint: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(joint)
        return _kernels().geglu(joint)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return _kernels().geglu_backward(gradients[0].contiguous(), *ctx.saved_tensors)


def _geglu(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """(…, in) -> (…, out); as diffusers has it where a compiler looks on."""
    if torch.compiler.is_compiling():
        return GEGLU.forward(module, hidden)
    joint = module.proj(hidden)
    return _Geglu.apply(joint.flatten(0, -2).contiguous()).view(*joint.shape[:-1], -1)


def _is_plain(block: ResnetBlock2D) -> bool:
    """Whether it does no more than SD's UNets ask of it."""
    more = block.up or block.down or block.skip_time_act or block.output_scale_factor != 1
    return not more and block.time_embedding_norm == "default" and isinstance(block.nonlinearity, torch.nn.SiLU)


def _resnet(block: Any, x: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
    """(B, in, H, W) -> (B, out, H, W), the same as diffusers', with the bias of the first convolution added to what the
    time adds."""
    shift = None if temb is None or block.time_emb_proj is None else block.time_emb_proj(F.silu(temb))
    first, hidden = block.conv1, normalized(block.norm1, x, silu=True)
    if type(first) is torch.nn.Conv2d and first.bias is not None and shift is not None:
        hidden = first._conv_forward(hidden, first.weight, None)
        shift = shift + first.bias
    else:
        hidden = first(hidden)
    hidden = block.conv2(block.dropout(normalized(block.norm2, hidden, shift, silu=True)))
    return (x if block.conv_shortcut is None else block.conv_shortcut(x)) + hidden


def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether outputs and gradients of all that is compiled are torch's, of small ones."""
    found = []
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 40, 20, 20), (2, 40, 20, 20), (5, 80), (5, 40), (2, 40)
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    picture, by, joint, by_joint, affine = drawn
    norm = torch.nn.GroupNorm(2, 40, device=device, dtype=dtype).requires_grad_(False)
    norm.weight.copy_(affine[0]), norm.bias.copy_(affine[1])
    picture, by = (one.contiguous(memory_format=torch.channels_last) for one in (picture, by))
    for is_ours in (True, False):
        x, both = picture.clone().requires_grad_(True), joint.clone().requires_grad_(True)
        hidden, gate = both.chunk(2, -1)
        outs = [_Geglu.apply(both) if is_ours else hidden * F.gelu(gate)]
        for shift, silu in ((by[:, :, 0, 0], True), (None, True), (None, False)):
            if is_ours:
                outs.append(normalized(norm, x, shift, silu))
            else:
                plain = norm(x if shift is None else x + shift[:, :, None, None])
                outs.append(F.silu(plain) if silu else plain)
        torch.autograd.backward(outs, (by_joint, by, by, by))
        found.append((*outs, x.grad, both.grad))
    limit = TOLERANCE[dtype]
    return all(bool(((a - b).abs() <= limit * (1 + b.abs())).all()) for a, b in zip(*found, strict=True))


def _kernels() -> Any:
    return import_module("scumble.trainer.kernels.triton_kernels")
