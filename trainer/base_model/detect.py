"""Bases: a diffusers folder, a hub id or one `.safetensors` file, recognised from its files before a weight is loaded.

What differs between the families is data (`FAMILIES`). Nothing here needs diffusers, so a check answers at once.
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
    """A kind of base: how wide its text is, which configs a single file takes, how its adapters' keys begin."""

    name: str
    label: str
    context_width: int
    configs: dict[str, str]  # prediction type -> folder of configs for a single file
    text_prefixes: tuple[str, ...]  # of adapter keys, one a text encoder (FORMAT: SD1 is lora_te, not lora_te1)


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

    @property
    def configs(self) -> Path:
        """The folder of its parts' configs; a single file takes those of its family."""
        return BASES / self.family.configs[self.prediction] if self.is_file else Path(self.place)

    @property
    def tokenizers(self) -> list[Path]:
        """Folders of the tokenizers, one a text encoder."""
        return [self.configs / name for name in ("tokenizer", "tokenizer_2")[: len(self.family.text_prefixes)]]


def detect_base(model: Model) -> DetectedBase:
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


def weights_in(folder: Path, variant: bool) -> Path | None:
    """A part's weights in a diffusers folder: the plain ones, or those that are published in fp16 only."""
    found = [path for path in sorted(folder.glob("*.safetensors")) if (".fp16" in path.name) == variant]
    return next((path for path in found if ".non_ema" not in path.name and ".ema_only" not in path.name), None)


def _from_folder(model: Model, folder: Path) -> DetectedBase:
    if not (folder / "model_index.json").is_file():
        raise Refused(f"--base {model.base}: no model_index.json in {folder.name}, so it is not a diffusers folder")
    if weights_in(folder / "unet", variant=False) is None and weights_in(folder / "unet", variant=True) is None:
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


def _from_file(model: Model, path: Path) -> DetectedBase:
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
) -> DetectedBase:
    """What the options say goes before what the files say; a single file takes its family's `configs`."""
    chosen = prediction if model.prediction_type == "auto" else model.prediction_type
    rescaled = zero_snr if model.zero_terminal_snr == "auto" else model.zero_terminal_snr
    if rescaled and chosen == "epsilon":
        raise Refused("--zero-terminal-snr needs a base with v-prediction: at pure noise, epsilon says nothing")
    sizes_px = _sizes_px(configs or BASES / family.configs[prediction])
    return DetectedBase(model.base, place, is_file, family, chosen, rescaled, *sizes_px)


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
        if weights_in(folder / "unet", variant=False) is None:  # published in fp16 only
            folder = Path(snapshot_download(hub_id, allow_patterns=plain, ignore_patterns=skipped))
        return folder
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise Refused(
            f"--base {hub_id}: no such folder here, not in the hub's local cache, and the hub cannot be reached", 69
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise Refused(f"--base {hub_id}: no such folder here, and the hub refuses it ({error})", UNAVAILABLE) from None
