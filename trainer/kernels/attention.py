"""Choose the fastest kernels for a UNet on a device. Results are the same up to rounding."""

from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    XFormersAttnProcessor,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from scumble.configs.errors import Refused
from scumble.datasets.reading.images import Size

from ..base_model.projection import project_tokens
from .fused_norms import fuse
from .lora_matmul import joint_linear
from .onednn_packing import pack_convolutions

MAX_LATENTS = 1024  # for matmul attention; above, storing the whole attention matrix takes too much memory


def choose_kernels(
    unet: UNet2DConditionModel,
    attention: str,
    largest: Size,
    latent_px: int,
    use_packing: bool = True,
    use_fused_norms: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Choose attention, memory layout and cuDNN autotuning for images of up to the size `largest`.

    In bf16 on a CPU with few tokens, torch's flash attention takes up to three times as long as plain matrix products
    (tests/benchmarks/LOG.md). xformers is used only if `attention` requests it. Raises `Refused` (69) if it fails.
    `report` is called with the reason if the fused CUDA kernels cannot be used.
    """
    if attention == "xformers":
        try_xformers(unet.device, unet.dtype)
        unet.set_attn_processor(XFormersAttnProcessor())
    elif (unet.device.type, unet.dtype) == ("cpu", torch.bfloat16) and num_latents(largest, latent_px) <= MAX_LATENTS:
        use_matmul_attention(unet)
    elif unet.device.type != "mps":  # up to macOS 14, MPS cannot write products into slices of a tensor
        use_joint_qkv(unet)
    project_tokens(unet)
    if use_packing and unet.device.type == "cpu":
        pack_convolutions(unet)
    if unet.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = True
        if use_fused_norms and (reason := fuse(unet)):
            report(f"fused norm and GEGLU kernels are off (torch's own need more memory): {reason}")
        if unet.dtype != torch.float32:
            torch.set_float32_matmul_precision("high")


def use_matmul_attention(unet: UNet2DConditionModel) -> None:
    """Compute attention with plain matrix products.

    q, k and v of the same input are one product, and the scores have hand-written gradients.
    """
    for block in unet.modules():
        if isinstance(block, Attention):
            attention: Any = block
            attention.set_processor(MatmulProcessor())
            attention.get_attention_scores = partial(_scores, attention, attention.get_attention_scores)


def use_joint_qkv(unet: UNet2DConditionModel) -> None:
    """Compute q, k and v of the same input as one product, and attention with torch's own kernel."""
    for block in unet.modules():
        if isinstance(block, Attention):
            attention: Any = block
            attention.set_processor(JointProcessor(AttnProcessor2_0()))


class JointProcessor:
    """Like diffusers' processors, but with one product for q, k and v (or k and v) of the same input.

    `fallback` is diffusers' own processor, for attention that does not support this.
    """

    def __init__(self, fallback: Callable[..., torch.Tensor]):
        self.fallback = fallback

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        qkv = None
        if attention_mask is None and is_plain_attention(attn, hidden_states):
            qkv = self.project(attn, hidden_states, encoder_hidden_states)
        if qkv is None:
            return self.fallback(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        out: Any = attn.to_out
        return out[1](out[0](self.attend(attn, qkv)))

    def project(self, attn: Attention, x: torch.Tensor, text: torch.Tensor | None) -> Iterable[torch.Tensor] | None:
        """Query, key and value, each (B, T, heads, C / heads); None if they cannot share a product."""
        if text is None:
            joint = joint_linear([attn.to_q, attn.to_k, attn.to_v], x)
            return None if joint is None else joint.unflatten(3, (attn.heads, -1)).unbind(2)
        joint = None if attn.norm_cross else joint_linear([attn.to_k, attn.to_v], text)
        if joint is None:
            return None
        return attn.to_q(x).unflatten(2, (attn.heads, -1)), *joint.unflatten(3, (attn.heads, -1)).unbind(2)

    def attend(self, attn: Attention, qkv: Iterable[torch.Tensor]) -> torch.Tensor:
        """The output of attention before its projection, (B, T, C)."""
        query, key, value = (one.transpose(1, 2) for one in qkv)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class MatmulProcessor(JointProcessor):
    """The same with plain matrix products. k and v of the text are not joined: that gains nothing on a CPU."""

    def __init__(self) -> None:
        super().__init__(AttnProcessor())

    def project(self, attn: Attention, x: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor | None:
        joint = joint_linear([attn.to_q, attn.to_k, attn.to_v], x) if text is None else None
        return None if joint is None else joint.unflatten(3, (attn.heads, -1)).permute(2, 0, 3, 1, 4)

    def attend(self, attn: Attention, qkv: Any) -> torch.Tensor:
        query, key, value = qkv.flatten(1, 2).unbind()  # one copy makes all three contiguous
        return attn.batch_to_head_dim(torch.bmm(attn.get_attention_scores(query, key), value))


def is_plain_attention(attn: Attention, hidden: torch.Tensor) -> bool:
    """Whether the input is (B, T, C) and the layer uses only the features that SD's UNets need."""
    is_plain = not any((attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.residual_connection))
    return hidden.ndim == 3 and is_plain and attn.rescale_output_factor == 1 and attn.inner_dim == attn.inner_kv_dim


def _scores(
    attention: Attention,
    original: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The attention scores; by the `original` method with a mask, if upcast, or while torch.compile traces."""
    if mask is not None or attention.upcast_attention or attention.upcast_softmax or torch.compiler.is_compiling():
        return original(query, key, mask)
    return _Scores.apply(query, key, attention.scale)


class _Scores(torch.autograd.Function):
    """(N, Q, C) and (N, K, C) -> softmax(scale · query keyᵀ) (N, Q, K).

    Autograd would scale both gradients in separate passes and return a transposed gradient of the key.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
        scores = scaled_bmm(query, key.transpose(1, 2), scale).softmax(-1)
        ctx.save_for_backward(query, key, scores)
        ctx.scale = scale
        return scores

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, scores = ctx.saved_tensors
        logits_grad = torch.ops.aten._softmax_backward_data(gradients[0], scores, -1, scores.dtype)
        query_grad = scaled_bmm(logits_grad, key, ctx.scale)
        return query_grad, scaled_bmm(logits_grad.transpose(1, 2), query, ctx.scale), None


def scaled_bmm(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · left @ right, (N, a, b) and (N, b, c) -> (N, a, c)."""
    empty = torch.empty(len(left), left.shape[1], right.shape[2], dtype=left.dtype, device=left.device)
    return torch.baddbmm(empty, left, right, beta=0, alpha=scale)


def try_xformers(device: torch.device, dtype: torch.dtype) -> None:
    """Raises `Refused` (69) if xformers, which is built for one torch version and some GPUs, does not work here.

    diffusers' own check runs in fp32 and only forward, so it does not test the kernel that the run uses.
    """
    probe = torch.ones(1, 2, 40, device=device, dtype=dtype, requires_grad=True)
    try:
        import_module("xformers.ops").memory_efficient_attention(probe, probe, probe).sum().backward()
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        raise Refused(
            f"--attention xformers: fails on {device} in {str(dtype).removeprefix('torch.')} "
            f"({(str(error).splitlines() or [''])[0]}); install the one built for torch {torch.__version__}, or use "
            "--attention sdpa",
            69,
        ) from None


def num_latents(size: Size, latent_px: int) -> int:
    """Latent pixels of an image, which is the number of tokens in the largest attention layer."""
    return size.width * size.height // latent_px**2
