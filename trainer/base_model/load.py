"""Loading a base: a diffusers folder or one `.safetensors` file -> the modules of a Stable Diffusion."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from scumble.configs.errors import Refused
from scumble.configs.options import Model

from ..system.device import free_unused
from .detect import BASES, DetectedBase, Family, weights_in
from .one_block import place_together, take_apart
from .quantize import check_bits, fewer_bits, quantize

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline
PIPELINES: dict[str, type[Pipeline]] = {
    "sd1": StableDiffusionPipeline,
    "sd2": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
}


@dataclass
class Base:
    """A loaded base. `pipeline` is stock diffusers over the very same modules; previews use it."""

    source: DetectedBase
    pipeline: Pipeline
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: list[CLIPTextModel | CLIPTextModelWithProjection]
    tokenizers: list[CLIPTokenizer]
    alphas_cumprod: torch.Tensor  # (1000,), after the zero-terminal rescale where there is one
    num_weights: int  # of UNet and text encoders
    device: torch.device  # where it computes; what waits lies in `offload_device`, see parking
    bits: int = 16  # of the UNet's transformer blocks; 16: those of its dtype

    @property
    def family(self) -> Family:
        return self.source.family


def load(model: Model, source: DetectedBase, device: torch.device, dtype: torch.dtype) -> Base:
    """Load every module of a recognised base onto `device`; all weights are frozen.

    The UNet and the text encoders are in `dtype`; the VAE too, but never in fp16, where SDXL's gives NaN.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    settings: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True, "use_safetensors": True}
    kind = PIPELINES[source.family.name]
    if kind is StableDiffusionPipeline:
        settings |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch_dtype.*")  # newer diffusers say dtype, older know it not
        if source.is_file:
            pipeline = kind.from_single_file(source.place, config=str(source.configs), **settings)
        else:
            if weights_in(Path(source.place) / "unet", variant=False) is None:
                settings["variant"] = "fp16"
            pipeline = kind.from_pretrained(source.place, **settings)
    if model.vae:
        pipeline.register_modules(vae=load_vae(model.vae, source.family, dtype))
    schedule: dict[str, object] = {"prediction_type": source.prediction}
    if source.zero_terminal_snr:  # then the first step of sampling must be the last that was trained
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **schedule)
    assert isinstance(scheduler, DDIMScheduler)
    pipeline.register_modules(scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    encoders, tokenizers = [pipeline.text_encoder], [pipeline.tokenizer]
    if isinstance(pipeline, StableDiffusionXLPipeline):
        encoders.append(pipeline.text_encoder_2)
        tokenizers.append(pipeline.tokenizer_2)
    for module in (pipeline.unet, pipeline.vae, *encoders):
        module.requires_grad_(False).eval()
    num_weights = sum(weight.numel() for module in (pipeline.unet, *encoders) for weight in module.parameters())
    pipeline.to(device, silence_dtype_warnings=True)  # in fp16 modules may wait on the CPU
    if dtype == torch.float16:
        pipeline.vae.float()
    return Base(
        source, pipeline, pipeline.unet, pipeline.vae, encoders, tokenizers, scheduler.alphas_cumprod, num_weights,
        device,
    )  # fmt: skip


def offload_device(device: torch.device) -> torch.device:
    """Where modules lie while they do not compute: for CUDA in the machine's memory."""
    return torch.device("cpu") if device.type == "cuda" else device


def load_offloaded(model: Model, source: DetectedBase, device: torch.device, dtype: torch.dtype) -> Base:
    """As `load`, but every module waits to be fetched, see parking; the UNet for `place_unet`."""
    base = load(model, source, offload_device(device), dtype)
    base.device = device
    return base


def place_unet(base: Base, model: Model, bits: int) -> UNet2DConditionModel:
    """Bring a waiting UNet to where it computes; with 8 or 4 bits it never lies there in more.

    4 bits are made of the weights in the file, so that they are the same whatever came before.
    """
    if bits < 16:
        check_bits(bits, base.device.type)
        is_dense, base.bits = base.bits == 16, bits
        in_16 = base.unet if is_dense else load(model, base.source, torch.device("cpu"), base.unet.dtype).unet
        if base.device.type == "cuda":
            take_apart(base.unet, offload_device(base.device))  # else those that stay would keep the memory of all
            free_unused()  # else the first of the new ones would
        quantize(base.unet, bits, base.device, in_16)
    if base.device.type != "cuda":
        return base.unet.to(base.device)
    place_together(base.unet, base.device)
    return base.unet


def take_fewer_bits(base: Base, model: Model) -> int:
    """Keep the UNet of a base in the next fewer bits, and say how many; 0, and nothing done, where none are."""
    bits = fewer_bits(base.bits, base.device.type)
    if bits:
        place_unet(base, model, bits)
    return bits


def load_vae(vae: str, family: Family, dtype: torch.dtype) -> AutoencoderKL:
    """A VAE from its own diffusers folder or single file. Raises `Refused` where there is none."""
    if Path(vae).is_file():
        found = AutoencoderKL.from_single_file(
            vae, torch_dtype=dtype, config=str(BASES / family.configs["epsilon"]), subfolder="vae"
        )
        assert isinstance(found, AutoencoderKL)
        return found
    if not (Path(vae) / "config.json").is_file():
        raise Refused(f"--vae {vae}: no file, nor a folder with the config.json of a VAE there")
    return AutoencoderKL.from_pretrained(vae, torch_dtype=dtype, local_files_only=True)
