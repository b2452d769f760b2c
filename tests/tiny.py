"""Tiny bases with random weights in the layouts of SD 1, SD 2 and SDXL, with the real CLIP tokenizer."""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from paths import CHECKOUT
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

CONFIGS = CHECKOUT / "configs/bases"
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


NO_SAFETY: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def text_config(width: int, layers: int = 2) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, projection_dim=width, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip


def tiny_base(kind: str, folder: Path) -> Path:
    """Write a pipeline of `kind` sd1, sd2, sd2-v or sdxl into `folder`: three UNet levels, images of 64 px."""
    torch.manual_seed(0)
    xl = kind == "sdxl"
    width = 1024 if kind.startswith("sd2") else 32
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D" if xl else "CrossAttnDownBlock2D", *("CrossAttnDownBlock2D",) * 2),
        up_block_types=(*("CrossAttnUpBlock2D",) * 2, "UpBlock2D" if xl else "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=32 + 48 if xl else width,
        attention_head_dim=4,
        norm_num_groups=8,
        use_linear_projection=kind != "sd1",
        transformer_layers_per_block=(1, 1, 2) if xl else 1,
        addition_embed_type="text_time" if xl else None,
        addition_time_embed_dim=8 if xl else None,
        projection_class_embeddings_input_dim=48 + 6 * 8 if xl else None,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=8, sample_size=64,
    )  # fmt: skip
    schedule = SCHEDULE | {"prediction_type": "v_prediction" if kind == "sd2-v" else "epsilon"}
    parts: dict[str, Any] = {"vae": vae, "unet": unet, "scheduler": DDIMScheduler(**schedule)}
    tokenizer = CLIPTokenizer.from_pretrained(CONFIGS / "sd15/tokenizer")
    if xl:
        pipeline = StableDiffusionXLPipeline(
            text_encoder=CLIPTextModel(text_config(32)), tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(text_config(48)),
            tokenizer_2=CLIPTokenizer.from_pretrained(CONFIGS / "sdxl/tokenizer_2"), **parts,
        )  # fmt: skip
    else:
        pipeline = StableDiffusionPipeline(
            text_encoder=CLIPTextModel(text_config(width)), tokenizer=tokenizer,
            **parts, **NO_SAFETY,
        )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder
