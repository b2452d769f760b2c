"""Which kernels compute a UNet fastest on a device, at the same numbers but for rounding."""

from importlib import import_module

import torch
from diffusers.models.attention_processor import AttnProcessor, XFormersAttnProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from scumble.configs.errors import Refused
from scumble.datasets.images import Size

from .packing import pack_convolutions

FEW_LATENTS = 1024  # more, and attention that keeps its whole matrix takes too much memory


def choose_kernels(
    unet: UNet2DConditionModel, attention: str, largest: Size, latent_px: int, packs: bool = True
) -> None:
    """Settle attention, memory layout and the search for convolutions, for pictures of up to `largest`.

    In bf16 on a CPU, torch's flash attention takes up to three times as long for few tokens as plain products do
    (tests/benchmarks/LOG.md). xformers is taken where `attention` says so. Raises `Refused` (69) where it fails.
    """
    if attention == "xformers":
        try_xformers(unet.device, unet.dtype)
        unet.set_attn_processor(XFormersAttnProcessor())
    elif (unet.device.type, unet.dtype) == ("cpu", torch.bfloat16) and num_latents(largest, latent_px) <= FEW_LATENTS:
        unet.set_attn_processor(AttnProcessor())
    if packs and unet.device.type == "cpu":
        pack_convolutions(unet)
    if unet.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = True
        if unet.dtype != torch.float32:
            torch.set_float32_matmul_precision("high")


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
