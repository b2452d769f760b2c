"""Locate the weights of a base on disk: tensor names in a diffusers folder or a single-file checkpoint -> module paths.

A single-file checkpoint has the UNet under LDM names (`model.diffusion_model.input_blocks.1.1.…`) and the text encoders
under transformers names (`cond_stage_model.transformer.…`, `conditioner.embedders.0.transformer.…`) or OpenCLIP names
(`cond_stage_model.model.…`, `conditioner.embedders.1.model.…`). OpenCLIP fuses q, k and v into one `in_proj_weight`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from scumble.configs.errors import Refused

from ..system.safetensors_header import read_header
from .base_tags import FAMILY_OF_CONTEXT
from .keys import UNET_LAYER, ModulePath, diffusers_path

FOLDERS = {"unet": "unet", "text_encoder": "text", "text_encoder_2": "text2"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".onnx", ".pb")
PREFIXES = (
    ("model.diffusion_model.", "unet"), ("conditioner.embedders.0.transformer.text_model.", "text"),
    ("conditioner.embedders.1.model.", "text2"),
    ("cond_stage_model.transformer.text_model.", "text"), ("cond_stage_model.transformer.", "text"),
    ("cond_stage_model.model.", "text"),
)  # fmt: skip
OPEN_CLIP = re.compile(
    r"transformer\.resblocks\.(\d+)\.(attn\.in_proj_weight|(attn\.out_proj|mlp\.c_fc|mlp\.c_proj)\.weight)"
)
OPEN_CLIP_LAYERS = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
TEXT_LAYER = re.compile(r"encoder\.layers\.\d+\.(self_attn|mlp)\.\w+")


@dataclass(frozen=True)
class StoredWeight:
    """One layer's weight on disk: a whole tensor, or the rows of q, k or v (`third` 0, 1, 2) in a fused matrix.

    `shape` is the shape of the layer's weight, (out, in) or (out, in, h, w).
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    third: int | None = None


@dataclass(frozen=True)
class Weights:
    """A base on disk, a folder or a single file: the layers that an adapter can modify. Nothing is loaded."""

    path: Path
    layers: dict[ModulePath, StoredWeight]
    family: str

    def read(self, layer: ModulePath) -> torch.Tensor:
        """Read the layer's weight in its stored dtype. Only this tensor is read."""
        stored = self.layers[layer]
        with safe_open(stored.file, "pt") as file:
            return rows(file.get_tensor(stored.name), stored.third)


def rows(tensor: torch.Tensor, third: int | None) -> torch.Tensor:
    """Return a view of the rows of q, k or v in a fused matrix, or the whole tensor if `third` is None."""
    return tensor if third is None else tensor.chunk(3)[third]


def find_weights(path: Path) -> Weights:
    """Find the layers of a base. Raises `Refused` if `path` is not a base or is a pickle."""
    if path.is_dir():
        files = [(file, component) for folder, component in FOLDERS.items() for file in weight_files(path / folder)]
        if not files:
            raise Refused(
                f"{path}: no .safetensors file in unet/ or text_encoder/; pickle files (.bin) are not read, since they "
                "can run arbitrary code"
            )
    elif path.is_file():
        if path.suffix.lower() in PICKLES:
            raise Refused(f"{path}: pickle files can run arbitrary code; use a .safetensors file")
        files = [(path, None)]
    else:
        raise Refused(f"{path}: no such file or folder")
    layers: dict[ModulePath, StoredWeight] = {}
    family = "sd1"
    widths: set[int] = set()
    for file, component in files:
        for name, entry in read_header(file).entries.items():
            for layer, third in layers_of(name, component):
                if len(entry.shape) >= 2:  # skips norms and biases
                    out, *inputs = entry.shape
                    shape = (out if third is None else out // 3, *inputs)
                    layers.setdefault(layer, StoredWeight(file, name, shape, third))
                    if layer.component == "unet" and layer.path.endswith("attn2.to_k"):
                        widths.add(shape[1])
            if name.startswith("cond_stage_model.model."):
                family = "sd2"
    if not layers:
        raise Refused(f"{path}: not a Stable Diffusion model; use a diffusers folder or a full checkpoint")
    if any(layer.component == "text2" for layer in layers):
        family = "sdxl"
    known = [FAMILY_OF_CONTEXT[width] for width in widths if width in FAMILY_OF_CONTEXT]
    return Weights(path, layers, known[0] if known else family)


def weight_files(folder: Path, all_variants: bool = False) -> list[Path]:
    """Return the .safetensors files of a subfolder: without a variant (including shards) if any, else fp16 or bf16."""
    found = sorted(folder.glob("*.safetensors"))
    if all_variants:
        return found
    plain = [path for path in found if not re.search(r"\.(fp16|bf16|non_ema|ema_only)\b", path.name)]
    return plain or [path for path in found if ".non_ema" not in path.name and ".ema_only" not in path.name]


def layers_of(name: str, component: str | None) -> Iterator[tuple[ModulePath, int | None]]:
    """Yield the layers whose weight a tensor holds: none if no adapter can modify it, three for a fused matrix.

    The second value is the third of the fused matrix, or None. `component` is None for a single-file checkpoint.
    """
    if component is None:
        prefix, component = next(((p, c) for p, c in PREFIXES if name.startswith(p)), ("", None))
        name = name.removeprefix(prefix)
        if component is None:
            return
    if component != "unet" and (found := OPEN_CLIP.fullmatch(name)):
        path = f"encoder.layers.{found[1]}"
        if found[3]:
            yield ModulePath(component, f"{path}.{OPEN_CLIP_LAYERS[found[3]]}"), None
        else:
            for third, letter in enumerate("qkv"):
                yield ModulePath(component, f"{path}.self_attn.{letter}_proj"), third
        return
    if not name.endswith(".weight"):
        return
    path = name.removesuffix(".weight")
    try:
        path = diffusers_path(path) if component == "unet" else path.removeprefix("text_model.")
    except (KeyError, ValueError):  # an LDM name of a layer that no adapter can modify
        return
    if (UNET_LAYER if component == "unet" else TEXT_LAYER).fullmatch(path):
        yield ModulePath(component, path), None
