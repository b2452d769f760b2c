"""Which kernels compute a UNet fastest on a device, at the same numbers but for rounding."""

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

FEW_LATENTS = 1024  # more, and attention that keeps its whole matrix takes too much memory


def choose_kernels(
    unet: UNet2DConditionModel,
    attention: str,
    largest: Size,
    latent_px: int,
    packs: bool = True,
    fuses: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Settle attention, memory layout and the search for convolutions, for pictures of up to `largest`.

    In bf16 on a CPU, torch's flash attention takes up to three times as long for few tokens as plain products do
    (tests/benchmarks/LOG.md). xformers is taken where `attention` says so. Raises `Refused` (69) where it fails. `say`
    is told where our own kernels for CUDA are not taken, and why.
    """
    if attention == "xformers":
        try_xformers(unet.device, unet.dtype)
        unet.set_attn_processor(XFormersAttnProcessor())
    elif (unet.device.type, unet.dtype) == ("cpu", torch.bfloat16) and num_latents(largest, latent_px) <= FEW_LATENTS:
        attend_by_products(unet)
    elif unet.device.type != "mps":  # which up to macOS 14 does not write products into parts of a tensor
        attend_jointly(unet)
    project_tokens(unet)
    if packs and unet.device.type == "cpu":
        pack_convolutions(unet)
    if unet.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = True
        if fuses and (reason := fuse(unet)):
            say(f"norms and gates by torch's own kernels, which take more memory: {reason}")
        if unet.dtype != torch.float32:
            torch.set_float32_matmul_precision("high")


def attend_by_products(unet: UNet2DConditionModel) -> None:
    """Let attention be plain products: of q, k and v together where they are of one input, and of scores with their
    gradients by hand."""
    for block in unet.modules():
        if isinstance(block, Attention):
            attention: Any = block
            attention.set_processor(Products())
            attention.get_attention_scores = partial(_scores, attention, attention.get_attention_scores)


def attend_jointly(unet: UNet2DConditionModel) -> None:
    """Let attention be torch's own of q, k and v that are computed together."""
    for block in unet.modules():
        if isinstance(block, Attention):
            attention: Any = block
            attention.set_processor(Joint(AttnProcessor2_0()))


class Joint:
    """diffusers' attention; where q, k and v, or k and v, are of one input, by fewer and larger products."""

    def __init__(self, apart: Callable[..., torch.Tensor]):
        self.apart = apart

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        parts = None
        if attention_mask is None and is_of_tokens(attn, hidden_states):
            parts = self.parts(attn, hidden_states, encoder_hidden_states)
        if parts is None:
            return self.apart(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        out: Any = attn.to_out
        return out[1](out[0](self.attended(attn, parts)))

    def parts(self, attn: Attention, hidden: torch.Tensor, text: torch.Tensor | None) -> Iterable[torch.Tensor] | None:
        """Query, key and value, each (B, T, heads, C / heads); None where they take no fewer products."""
        if text is None:
            joint = joint_linear([attn.to_q, attn.to_k, attn.to_v], hidden)
            return None if joint is None else joint.unflatten(3, (attn.heads, -1)).unbind(2)
        joint = None if attn.norm_cross else joint_linear([attn.to_k, attn.to_v], text)
        if joint is None:
            return None
        return attn.to_q(hidden).unflatten(2, (attn.heads, -1)), *joint.unflatten(3, (attn.heads, -1)).unbind(2)

    def attended(self, attn: Attention, parts: Iterable[torch.Tensor]) -> torch.Tensor:
        """Of those parts, (B, T, C)."""
        query, key, value = (part.transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Products(Joint):
    """The same by plain products of scores and values. Only q, k and v together: k and v of the text gain nothing on a
    CPU."""

    def __init__(self) -> None:
        super().__init__(AttnProcessor())

    def parts(self, attn: Attention, hidden: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor | None:
        joint = joint_linear([attn.to_q, attn.to_k, attn.to_v], hidden) if text is None else None
        return None if joint is None else joint.unflatten(3, (attn.heads, -1)).permute(2, 0, 3, 1, 4)

    def attended(self, attn: Attention, parts: Any) -> torch.Tensor:
        query, key, value = parts.flatten(1, 2).unbind()  # in order by one copy
        return attn.batch_to_head_dim(torch.bmm(attn.get_attention_scores(query, key), value))


def is_of_tokens(attn: Attention, hidden: torch.Tensor) -> bool:
    """Whether it does with (B, T, C) no more than SD's UNets ask of it."""
    plain = not any((attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.residual_connection))
    return hidden.ndim == 3 and plain and attn.rescale_output_factor == 1 and attn.inner_dim == attn.inner_kv_dim


def _scores(
    attention: Attention,
    own: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Its scores; its `own` method's where there is more to them, or a compiler looks on."""
    if mask is not None or attention.upcast_attention or attention.upcast_softmax or torch.compiler.is_compiling():
        return own(query, key, mask)
    return _Scores.apply(query, key, attention.scale)


class _Scores(torch.autograd.Function):
    """(N, Q, C) and (N, K, C) -> softmax(scale · query keyᵀ) (N, Q, K). Autograd would scale both gradients in passes
    of their own, and give that of the key transposed."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
        scores = scaled_products(query, key.transpose(1, 2), scale).softmax(-1)
        ctx.save_for_backward(query, key, scores)
        ctx.scale = scale
        return scores

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, scores = ctx.saved_tensors
        before = torch.ops.aten._softmax_backward_data(gradients[0], scores, -1, scores.dtype)
        of_query = scaled_products(before, key, ctx.scale)
        return of_query, scaled_products(before.transpose(1, 2), query, ctx.scale), None


def scaled_products(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · left @ right, of (N, a, b) and (N, b, c)."""
    empty = torch.empty(len(left), left.shape[1], right.shape[2], dtype=left.dtype, device=left.device)
    return torch.baddbmm(empty, left, right, beta=0, alpha=scale)


def try_xformers(device: torch.device, dtype: torch.dtype) -> None:
    """Raises `Refused` (69) where xformers, which is built for one torch and some cards, does not compute here.

    diffusers' own trial is in fp32 and forward only, which says little about the run's kernel.
    """
    probe = torch.ones(1, 2, 40, device=device, dtype=dtype, requires_grad=True)
    try:
        import_module("xformers.ops").memory_efficient_attention(probe, probe, probe).sum().backward()
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        raise Refused(
            f"--attention xformers: fails on {device} in {str(dtype).removeprefix('torch.')} "
            f"({(str(error).splitlines() or [''])[0]}); install the one built for torch {torch.__version__}, or leave "
            "it out",
            69,
        ) from None


def num_latents(size: Size, latent_px: int) -> int:
    """Latent pixels of a picture, which are the tokens of the widest attention."""
    return size.width * size.height // latent_px**2
