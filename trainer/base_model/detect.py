"""Detect a base (a diffusers folder, a Hub ID or one `.safetensors` file) from its files, without loading weights.

`FAMILIES` holds everything that differs between the model families. This module does not import diffusers, so checks
are fast.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import UNAVAILABLE
from scumble.configs.files import BASES
from scumble.configs.options import Model

from ..system.safetensors_header import read_header

EMBEDDED = BASES / "sketch"


@dataclass(frozen=True)
class Family:
    """A model family: text encoding width, configs for single files, and the prefixes of adapter keys."""

    name: str
    label: str
    context_width: int
    configs: dict[str, str]  # prediction type -> folder of configs for a single file
    text_prefixes: tuple[str, ...]  # of adapter keys, one per text encoder (FORMAT: SD1 is lora_te, not lora_te1)


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "sd1", "Stable Diffusion 1", 768, {"epsilon": "sd15", "v_prediction": "sd15"}, ("lora_te",),
        ),
        Family(
            "sd2", "Stable Diffusion 2", 1024, {"epsilon": "sd21", "v_prediction": "sd21-v"}, ("lora_te",),
        ),
        Family(
            "sdxl", "Stable Diffusion XL", 2048, {"epsilon": "sdxl", "v_prediction": "sdxl"},
            ("lora_te1", "lora_te2"),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class DetectedBase:
    """A base as detected from its files. `path` is a folder or a file.

    `resolution_px` is the side of the square images that it was trained on, and `step_px` the recommended step between
    bucket sides. Sides must be multiples of `whole_px`, the total downsampling of VAE and UNet. One latent covers
    `latent_px` x `latent_px` pixels.
    """

    name: str
    path: str
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
        """The name shown to users."""
        return "sketch" if self.name == "sketch" else self.family.label

    @property
    def configs(self) -> Path:
        """The folder of component configs; a single file uses those of its family."""
        return BASES / self.family.configs[self.prediction] if self.is_file else Path(self.path)

    @property
    def tokenizers(self) -> list[Path]:
        """The tokenizer folders, one per text encoder."""
        return [self.configs / name for name in ("tokenizer", "tokenizer_2")[: len(self.family.text_prefixes)]]


def detect_base(model: Model) -> DetectedBase:
    """Detect family, prediction type and noise schedule from config files or tensor shapes.

    Raises `Refused` if the base does not exist, is a pickle, or is not a Stable Diffusion model, and (69) if it cannot
    be downloaded.
    """
    if model.base == "sketch":
        return _from_folder(model, EMBEDDED)
    path = Path(model.base)
    if path.is_dir():
        return _from_folder(model, path)
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise Refused(f"--base {model.base}: a pickle can execute arbitrary code; use the model's .safetensors file")
    if path.is_file():
        return _from_file(model, path)
    if path.suffix == ".safetensors" or model.base.startswith((".", "/", "~")) or model.base.count("/") != 1:
        raise Refused(f"--base {model.base}: no such file or folder")
    return _from_folder(model, _hub_snapshot(model.base))


def weights_in(folder: Path, variant: bool) -> Path | None:
    """The weights file of a component in a diffusers folder: the default one, or its fp16 variant if `variant`."""
    found = [path for path in sorted(folder.glob("*.safetensors")) if (".fp16" in path.name) == variant]
    return next((path for path in found if ".non_ema" not in path.name and ".ema_only" not in path.name), None)


def _from_folder(model: Model, folder: Path) -> DetectedBase:
    if not (folder / "model_index.json").is_file():
        raise Refused(f"--base {model.base}: not a diffusers folder, because {folder.name} has no model_index.json")
    if weights_in(folder / "unet", variant=False) is None and weights_in(folder / "unet", variant=True) is None:
        raise Refused(f"--base {model.base}: no .safetensors file in unet/; pickles (.bin) can execute arbitrary code")
    index, unet, scheduler = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
    )
    kind = index.get("_class_name", "")
    if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        raise Refused(f"--base {model.base}: a {kind} is not supported; use an SD 1.x, SD 2.x or SDXL model")
    if kind == "StableDiffusionXLPipeline":
        family = FAMILIES["sdxl"]
    else:
        family = FAMILIES["sd2" if unet["cross_attention_dim"] == 1024 else "sd1"]
    prediction = scheduler.get("prediction_type", "epsilon")
    zero_snr = bool(scheduler.get("rescale_betas_zero_snr"))
    return _detected(model, str(folder), False, family, prediction, zero_snr, folder)


def _from_file(model: Model, path: Path) -> DetectedBase:
    shapes = {name: entry.shape for name, entry in read_header(path).entries.items()}
    context = next((shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), None)
    family = next((family for family in FAMILIES.values() if family.context_width == context), None)
    if family is None or not any(name.startswith("model.diffusion_model.") for name in shapes):
        raise Refused(f"--base {path}: contains no SD 1.x, SD 2.x or SDXL UNet; use a full checkpoint")
    v_prediction = "v_pred" in shapes or (family.name == "sd2" and _sd2_predicts_v(path))
    prediction = "v_prediction" if v_prediction else "epsilon"
    return _detected(model, str(path), True, family, prediction, "ztsnr" in shapes, None)


def _sd2_predicts_v(path: Path) -> bool:
    """SD 2 and SD 2 base have the same keys and shapes; in v-prediction models the std of this bias exceeds 0.09."""
    with safe_open(path, "pt") as file:
        bias = file.get_tensor("model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias")
    return float(bias.float().std(correction=0)) > 0.09


def _detected(
    model: Model, place: str, is_file: bool, family: Family, prediction: str, zero_snr: bool, configs: Path | None
) -> DetectedBase:
    """Options override the files. Without `configs` (a single file), sizes come from the configs of the family."""
    chosen = prediction if model.prediction_type == "auto" else model.prediction_type
    rescaled = zero_snr if model.zero_terminal_snr == "auto" else model.zero_terminal_snr
    if rescaled and chosen == "epsilon":
        raise Refused("--zero-terminal-snr: requires a v-prediction base; epsilon carries no information at zero SNR")
    sizes_px = _sizes_px(configs or BASES / family.configs[prediction])
    return DetectedBase(model.base, place, is_file, family, chosen, rescaled, *sizes_px)


def _sizes_px(folder: Path) -> tuple[int, int, int, int]:
    """`resolution_px`, `step_px` (about a sixteenth of it), `whole_px` and `latent_px` from the component configs."""
    unet, vae = (json.loads((folder / part / "config.json").read_text(encoding="utf-8")) for part in ("unet", "vae"))
    latent_px = 2 ** (len(vae["block_out_channels"]) - 1)
    resolution_px = unet["sample_size"] * latent_px
    whole_px = latent_px * 2 ** (len(unet["block_out_channels"]) - 1)
    return resolution_px, whole_px * max(1, resolution_px // 16 // whole_px), whole_px, latent_px


def _hub_snapshot(hub_id: str) -> Path:
    """The folder of a Hub model, from the local cache or downloaded; respects HF_HUB_OFFLINE."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    small, skipped = ["*.json", "*.txt"], ["*/*.non_ema.*", "*/*.ema_only.*", "safety_checker/*", "*flax*"]
    try:
        plain = [*small, "*/*.safetensors"]
        folder = Path(snapshot_download(hub_id, allow_patterns=plain, ignore_patterns=[*skipped, "*/*.fp16.*"]))
        if weights_in(folder / "unet", variant=False) is None:  # published in fp16 only
            folder = Path(snapshot_download(hub_id, allow_patterns=plain, ignore_patterns=skipped))
        return folder
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise Refused(
            f"--base {hub_id}: no such local folder, not in the Hub cache, and the Hub cannot be reached", 69
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise Refused(
            f"--base {hub_id}: no such local folder, and the Hub returned an error ({error})", UNAVAILABLE
        ) from None
