"""Load a base from a diffusers folder or one `.safetensors` file."""

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
from .one_block import place_separately, place_together
from .quantize import check_bits, fewer_bits, quantize

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline
PIPELINES: dict[str, type[Pipeline]] = {
    "sd1": StableDiffusionPipeline,
    "sd2": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
}


@dataclass
class Base:
    """A loaded base. `pipeline` is the stock diffusers pipeline over the same modules, used for previews."""

    source: DetectedBase
    pipeline: Pipeline
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: list[CLIPTextModel | CLIPTextModelWithProjection]
    tokenizers: list[CLIPTokenizer]
    alphas_cumprod: torch.Tensor  # (1000,), after the zero-terminal-SNR rescale, if any
    num_weights: int  # parameters of the UNet and the text encoders
    device: torch.device  # where modules compute; offloaded ones are on `offload_device`, see offload.py
    bits: int = 16  # per weight of the UNet's transformer blocks; 16: not quantized

    @property
    def family(self) -> Family:
        return self.source.family


def load(model: Model, source: DetectedBase, device: torch.device, dtype: torch.dtype) -> Base:
    """Load all modules of a detected base onto `device`, with frozen weights.

    All modules use `dtype`, except the VAE if `dtype` is fp16: it stays in fp32, because the SDXL VAE outputs NaN in
    fp16.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    settings: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True, "use_safetensors": True}
    kind = PIPELINES[source.family.name]
    if kind is StableDiffusionPipeline:
        settings |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch_dtype.*")  # renamed to dtype in newer diffusers
        if source.is_file:
            pipeline = kind.from_single_file(source.path, config=str(source.configs), **settings)
        else:
            if weights_in(Path(source.path) / "unet", variant=False) is None:
                settings["variant"] = "fp16"
            pipeline = kind.from_pretrained(source.path, **settings)
    if model.vae:
        pipeline.register_modules(vae=load_vae(model.vae, source.family, dtype))
    schedule: dict[str, object] = {"prediction_type": source.prediction}
    if source.zero_terminal_snr:  # sampling must start at the last trained timestep
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
    pipeline.to(device, silence_dtype_warnings=True)  # fp16 modules may be offloaded to the CPU
    if dtype == torch.float16:
        pipeline.vae.float()
    return Base(
        source, pipeline, pipeline.unet, pipeline.vae, encoders, tokenizers, scheduler.alphas_cumprod, num_weights,
        device,
    )  # fmt: skip


def offload_device(device: torch.device) -> torch.device:
    """The device of idle modules: the CPU for CUDA, otherwise `device` itself."""
    return torch.device("cpu") if device.type == "cuda" else device


def load_offloaded(model: Model, source: DetectedBase, device: torch.device, dtype: torch.dtype) -> Base:
    """Like `load`, but modules stay offloaded until `fetch` (see offload.py), the UNet until `place_unet`."""
    base = load(model, source, offload_device(device), dtype)
    base.device = device
    return base


def place_unet(base: Base, model: Model, bits: int) -> UNet2DConditionModel:
    """Move an offloaded UNet to its device. With 8 or 4 bits, the device never holds the unquantized weights.

    Quantization to 4 bits starts from the weights in the file, so that the result does not depend on earlier
    quantization.
    """
    if bits < 16:
        check_bits(bits, base.device.type)
        is_dense, base.bits = base.bits == 16, bits
        dense = base.unet if is_dense else load(model, base.source, torch.device("cpu"), base.unet.dtype).unet
        if base.device.type == "cuda":
            place_separately(base.unet, offload_device(base.device))  # otherwise unquantized weights keep the block
            free_unused()  # otherwise the first quantized weight takes the block
        quantize(base.unet, bits, base.device, dense)
    if base.device.type != "cuda":
        return base.unet.to(base.device)
    place_together(base.unet, base.device)
    return base.unet


def take_fewer_bits(base: Base, model: Model) -> int:
    """Quantize the UNet to the next lower bit width and return it. Returns 0 and changes nothing if there is none."""
    bits = fewer_bits(base.bits, base.device.type)
    if bits:
        place_unet(base, model, bits)
    return bits


def load_vae(vae: str, family: Family, dtype: torch.dtype) -> AutoencoderKL:
    """Load a VAE from its diffusers folder or single file. Raises `Refused` if there is none."""
    if Path(vae).is_file():
        found = AutoencoderKL.from_single_file(
            vae, torch_dtype=dtype, config=str(BASES / family.configs["epsilon"]), subfolder="vae"
        )
        assert isinstance(found, AutoencoderKL)
        return found
    if not (Path(vae) / "config.json").is_file():
        raise Refused(f"--vae {vae}: not a file or a diffusers VAE folder with a config.json")
    return AutoencoderKL.from_pretrained(vae, torch_dtype=dtype, local_files_only=True)
