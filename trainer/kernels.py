"""Which kernels compute a UNet fastest on a device, at the same numbers but for rounding."""

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from scumble.datasets.images import Size

from .packing import pack_convolutions

FEW_LATENTS = 1024  # more, and attention that keeps its whole matrix takes too much memory


def choose_kernels(
    unet: UNet2DConditionModel, attention: str, largest: Size, latent_px: int, packs: bool = True
) -> None:
    """Settle attention, memory layout and the search for convolutions, for pictures of up to `largest`.

    In bf16 on a CPU, torch's flash attention takes up to three times as long for few tokens as plain products do
    (tests/benchmarks/LOG.md). xformers is taken where `attention` says so.
    """
    if attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    elif (unet.device.type, unet.dtype) == ("cpu", torch.bfloat16) and num_latents(largest, latent_px) <= FEW_LATENTS:
        unet.set_attn_processor(AttnProcessor())
    if packs and unet.device.type == "cpu":
        pack_convolutions(unet)
    if unet.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = True
        if unet.dtype != torch.float32:
            torch.set_float32_matmul_precision("high")


def num_latents(size: Size, latent_px: int) -> int:
    """Latent pixels of a picture, which are the tokens of the widest attention."""
    return size.width * size.height // latent_px**2
