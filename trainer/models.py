"""Bases: a diffusers folder, a hub id or one `.safetensors` file -> the modules of a Stable Diffusion.

What differs between the families is data (`FAMILIES`); the code path is one. A base is recognised from its files
before a weight is loaded.
"""

import json
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
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from scumble.configs.errors import Refused
from scumble.configs.options import Model

from .adapters.files import read_header

BASES = Path(__file__).parent.parent.resolve() / "configs" / "bases"
EMBEDDED = BASES / "sketch"

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline


@dataclass(frozen=True)
class Family:
    """A kind of base: how wide its text is, which configs a single file takes, how its adapters' keys begin."""

    name: str
    label: str
    context_width: int
    configs: dict[str, str]  # prediction type -> folder of configs for a single file
    text_prefixes: tuple[str, ...]  # of adapter keys, one a text encoder (FORMAT: SD1 is lora_te, not lora_te1)
    pipeline: type[Pipeline]


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "sd1", "Stable Diffusion 1", 768, {"epsilon": "sd15", "v_prediction": "sd15"}, ("lora_te",),
            StableDiffusionPipeline,
        ),
        Family(
            "sd2", "Stable Diffusion 2", 1024, {"epsilon": "sd21", "v_prediction": "sd21-v"}, ("lora_te",),
            StableDiffusionPipeline,
        ),
        Family(
            "sdxl", "Stable Diffusion XL", 2048, {"epsilon": "sdxl", "v_prediction": "sdxl"},
            ("lora_te1", "lora_te2"), StableDiffusionXLPipeline,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A base as recognised from its files: `place` is a folder or a file.

    `resolution_px` is the side of the square that it was made for, `step_px` the step of sides that suits it; sides
    must be multiples of `whole_px`, which VAE and UNet halve. A latent stands for `latent_px` each way.
    """

    name: str
    place: str
    is_file: bool
    family: Family
    prediction: str
    zero_terminal_snr: bool
    resolution_px: int
    step_px: int
    whole_px: int
    latent_px: int

    @property
    def label(self) -> str:
        """What people call it."""
        return "sketch" if self.name == "sketch" else self.family.label


@dataclass
class Base:
    """A loaded base. `pipeline` is stock diffusers over the very same modules; previews use it."""

    source: Source
    pipeline: Pipeline
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: list[CLIPTextModel | CLIPTextModelWithProjection]
    tokenizers: list[CLIPTokenizer]
    alphas_cumprod: torch.Tensor  # (1000,), after the zero-terminal rescale where there is one

    @property
    def family(self) -> Family:
        return self.source.family


def recognise(model: Model) -> Source:
    """Kind of base, prediction type and schedule, from config files or tensor shapes; no weight is loaded.

    Raises `Refused` for what is not there, is a pickle, or is not a Stable Diffusion.
    """
    if model.base == "sketch":
        return _from_folder(model, EMBEDDED)
    path = Path(model.base)
    if path.is_dir():
        return _from_folder(model, path)
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise Refused(f"--base {model.base}: a pickle can run any program hidden in it; use that model's .safetensors")
    if path.is_file():
        return _from_file(model, path)
    if path.suffix == ".safetensors" or model.base.startswith((".", "/", "~")) or model.base.count("/") != 1:
        raise Refused(f"--base {model.base}: no such file or folder")
    return _from_folder(model, _fetched(model.base))


def load(model: Model, source: Source, device: torch.device, dtype: torch.dtype) -> Base:
    """Load every module of a recognised base onto `device`; all weights are frozen.

    The UNet and the text encoders are in `dtype`; the VAE too, but never in fp16, where SDXL's gives NaN.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    settings: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True, "use_safetensors": True}
    if source.family.pipeline is StableDiffusionPipeline:
        settings |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch_dtype.*")  # newer diffusers say dtype, older know it not
        if source.is_file:
            config = BASES / source.family.configs[source.prediction]
            pipeline = source.family.pipeline.from_single_file(source.place, config=str(config), **settings)
        else:
            if _weights(Path(source.place) / "unet", variant=False) is None:
                settings["variant"] = "fp16"
            pipeline = source.family.pipeline.from_pretrained(source.place, **settings)
    if model.vae:
        pipeline.register_modules(vae=load_vae(model.vae, source.family, dtype))
    schedule: dict[str, object] = {"prediction_type": source.prediction}
    if source.zero_terminal_snr:  # then the first step of sampling must be the last that was trained
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **schedule)
    assert isinstance(scheduler, DDIMScheduler)
    pipeline.register_modules(scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    if dtype == torch.float16:
        pipeline.vae.to(torch.float32)
    encoders, tokenizers = [pipeline.text_encoder], [pipeline.tokenizer]
    if isinstance(pipeline, StableDiffusionXLPipeline):
        encoders.append(pipeline.text_encoder_2)
        tokenizers.append(pipeline.tokenizer_2)
    for module in (pipeline.unet, pipeline.vae, *encoders):
        module.requires_grad_(False).eval()
    return Base(source, pipeline, pipeline.unet, pipeline.vae, encoders, tokenizers, scheduler.alphas_cumprod)


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


def _from_folder(model: Model, folder: Path) -> Source:
    if not (folder / "model_index.json").is_file():
        raise Refused(f"--base {model.base}: no model_index.json in {folder.name}, so it is not a diffusers folder")
    if _weights(folder / "unet", variant=False) is None and _weights(folder / "unet", variant=True) is None:
        raise Refused(f"--base {model.base}: has no .safetensors in unet/; pickles (.bin) can run any program")
    index, unet, scheduler = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
    )
    kind = index.get("_class_name", "")
    if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        raise Refused(f"--base {model.base}: is a {kind}; SD 1.x, SD 2.x and SDXL can be adapted")
    if kind == "StableDiffusionXLPipeline":
        family = FAMILIES["sdxl"]
    else:
        family = FAMILIES["sd2" if unet["cross_attention_dim"] == 1024 else "sd1"]
    prediction = scheduler.get("prediction_type", "epsilon")
    zero_snr = bool(scheduler.get("rescale_betas_zero_snr"))
    return _source(model, str(folder), False, family, prediction, zero_snr, folder)


def _weights(folder: Path, variant: bool) -> Path | None:
    """A part's weights in a diffusers folder: the plain ones, or those that are published in fp16 only."""
    found = [path for path in sorted(folder.glob("*.safetensors")) if (".fp16" in path.name) == variant]
    return next((path for path in found if ".non_ema" not in path.name and ".ema_only" not in path.name), None)


def _from_file(model: Model, path: Path) -> Source:
    shapes = {name: entry.shape for name, entry in read_header(path).entries.items()}
    context = next((shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), None)
    family = next((family for family in FAMILIES.values() if family.context_width == context), None)
    if family is None or not any(name.startswith("model.diffusion_model.") for name in shapes):
        raise Refused(f"--base {path}: no UNet of SD 1.x, SD 2.x or SDXL in it; give a whole checkpoint")
    v_prediction = "v_pred" in shapes or (family.name == "sd2" and _sd2_predicts_v(path))
    prediction = "v_prediction" if v_prediction else "epsilon"
    return _source(model, str(path), True, family, prediction, "ztsnr" in shapes, None)


def _sd2_predicts_v(path: Path) -> bool:
    """SD 2 and SD 2 base have the same keys and shapes; this bias spreads above 0.09 where v is predicted."""
    with safe_open(path, "pt") as file:
        bias = file.get_tensor("model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias")
    return float(bias.float().std(correction=0)) > 0.09


def _source(
    model: Model, place: str, is_file: bool, family: Family, prediction: str, zero_snr: bool, configs: Path | None
) -> Source:
    """What the options say goes before what the files say; a single file takes its family's `configs`."""
    chosen = prediction if model.prediction == "auto" else model.prediction
    rescaled = zero_snr if model.zero_terminal_snr == "auto" else model.zero_terminal_snr
    if rescaled and chosen == "epsilon":
        raise Refused("--zero-terminal-snr needs a base with v-prediction: at pure noise, epsilon says nothing")
    sizes_px = _sizes_px(configs or BASES / family.configs[prediction])
    return Source(model.base, place, is_file, family, chosen, rescaled, *sizes_px)


def _sizes_px(folder: Path) -> tuple[int, int, int, int]:
    """The base's own resolution, the step of sides (not under a sixteenth of it), the least step, and a latent's."""
    unet, vae = (json.loads((folder / part / "config.json").read_text(encoding="utf-8")) for part in ("unet", "vae"))
    latent_px = 2 ** (len(vae["block_out_channels"]) - 1)
    resolution_px = unet["sample_size"] * latent_px
    whole_px = latent_px * 2 ** (len(unet["block_out_channels"]) - 1)
    return resolution_px, whole_px * max(1, resolution_px // 16 // whole_px), whole_px, latent_px


def _fetched(hub_id: str) -> Path:
    """The folder of a hub model, from the local cache or the hub; HF_HUB_OFFLINE is honoured."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    small, skipped = ["*.json", "*.txt"], ["*/*.non_ema.*", "*/*.ema_only.*", "safety_checker/*", "*flax*"]
    try:
        plain = [*small, "*/*.safetensors"]
        folder = Path(snapshot_download(hub_id, allow_patterns=plain, ignore_patterns=[*skipped, "*/*.fp16.*"]))
        if _weights(folder / "unet", variant=False) is None:  # published in fp16 only
            folder = Path(snapshot_download(hub_id, allow_patterns=plain, ignore_patterns=skipped))
        return folder
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise Refused(
            f"--base {hub_id}: no such folder here, not in the hub's local cache, and the hub cannot be reached", 69
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise Refused(f"--base {hub_id}: no such folder here, and the hub refuses it ({error})", 69) from None
