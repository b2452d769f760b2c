"""Bases: where a base model lies and how it is loaded as a diffusers pipeline, without a network."""

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from scumble.configs.errors import Refused
from scumble.configs.options import Model

EMBEDDED = Path(__file__).parent.parent / "configs" / "bases" / "sketch"


def base_folder(base: str) -> Path:
    """The diffusers folder of a base: `sketch`, or a path. Raises `Refused` where there is none."""
    folder = EMBEDDED.resolve() if base == "sketch" else Path(base)
    if not folder.is_dir():
        raise Refused(f"--base {base}: no such folder; give a diffusers folder, or sketch for the embedded base")
    if not (folder / "model_index.json").is_file():
        raise Refused(f"--base {base}: has no model_index.json, so it is not a diffusers folder")
    return folder


def load_vae(vae: str, dtype: torch.dtype) -> AutoencoderKL:
    """A VAE from its own diffusers folder. Raises `Refused` where there is none."""
    if not (Path(vae) / "config.json").is_file():
        raise Refused(f"--vae {vae}: no folder with the config.json of a VAE there")
    return AutoencoderKL.from_pretrained(vae, torch_dtype=dtype, local_files_only=True)


def load_pipeline(model: Model, device: torch.device, dtype: torch.dtype) -> StableDiffusionPipeline:
    """Stock diffusers on a local folder: nothing is fetched, no safety checker, no progress bars."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        base_folder(model.base),
        torch_dtype=dtype,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        local_files_only=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    if model.vae:
        pipeline.register_modules(vae=load_vae(model.vae, dtype))
    schedule: dict[str, object] = {}
    if model.prediction != "auto":
        schedule["prediction_type"] = model.prediction
    if model.zero_terminal_snr is True:  # Lin et al. 2023: the first sampled step must then be the last trained one
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.register_modules(scheduler=DDIMScheduler.from_config(pipeline.scheduler.config, **schedule))
    return pipeline.to(device)
