"""Where the weights of a base lie: names in a diffusers folder or in one file of the original code <-> our places.

One file holds the UNet under LDM's names (`model.diffusion_model.input_blocks.1.1.…`), the text encoders under
transformers' (`cond_stage_model.transformer.…`, `conditioner.embedders.0.transformer.…`) or OpenCLIP's
(`cond_stage_model.model.…`, `conditioner.embedders.1.model.…`), which keep q, k and v in one matrix `in_proj_weight`.
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
class Spot:
    """One layer's weight on disk: a tensor, or in a fused matrix the third number `third` (0, 1, 2) of its rows.

    `shape` is that of the layer's own weight, (out, in) or (out, in, h, w).
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    third: int | None = None


@dataclass(frozen=True)
class Weights:
    """A base on disk: the layers that an adapter may sit on, in a folder's files or in one; nothing is loaded."""

    path: Path
    spots: dict[ModulePath, Spot]
    family: str

    def read(self, place: ModulePath) -> torch.Tensor:
        """The layer's weight as it is stored; only this one tensor is read."""
        spot = self.spots[place]
        with safe_open(spot.file, "pt") as file:
            return rows(file.get_tensor(spot.name), spot.third)


def rows(tensor: torch.Tensor, third: int | None) -> torch.Tensor:
    """A view of the rows of q, k or v in a fused matrix, or the whole tensor."""
    return tensor if third is None else tensor.chunk(3)[third]


def find_weights(path: Path) -> Weights:
    """The layers of a base. Raises `Refused` where there is no base or it is a pickle."""
    if path.is_dir():
        files = [(file, component) for part, component in FOLDERS.items() for file in weight_files(path / part)]
        if not files:
            raise Refused(f"{path}: has no .safetensors in unet/ or a text encoder; pickles (.bin) can run any program")
    elif path.is_file():
        if path.suffix.lower() in PICKLES:
            raise Refused(f"{path}: a pickle can run any program hidden in it; only .safetensors is read")
        files = [(path, None)]
    else:
        raise Refused(f"{path}: no such file or folder")
    spots: dict[ModulePath, Spot] = {}
    family = "sd1"
    widths: set[int] = set()
    for file, component in files:
        for name, entry in read_header(file).entries.items():
            for place, third in places_of(name, component):
                if len(entry.shape) >= 2:  # a norm or a bias is no layer
                    out, *inputs = entry.shape
                    shape = (out if third is None else out // 3, *inputs)
                    spots.setdefault(place, Spot(file, name, shape, third))
                    if place.component == "unet" and place.path.endswith("attn2.to_k"):
                        widths.add(shape[1])
            if name.startswith("cond_stage_model.model."):
                family = "sd2"
    if not spots:
        raise Refused(f"{path}: no Stable Diffusion in it; give a diffusers folder or a whole checkpoint")
    if any(place.component == "text2" for place in spots):
        family = "sdxl"
    known = [FAMILY_OF_CONTEXT[width] for width in widths if width in FAMILY_OF_CONTEXT]
    return Weights(path, spots, known[0] if known else family)


def weight_files(folder: Path, all_variants: bool = False) -> list[Path]:
    """The .safetensors of one part: the plain ones (shards too), or the fp16 ones where there are no others."""
    found = sorted(folder.glob("*.safetensors"))
    if all_variants:
        return found
    plain = [path for path in found if not re.search(r"\.(fp16|bf16|non_ema|ema_only)\b", path.name)]
    return plain or [path for path in found if ".non_ema" not in path.name and ".ema_only" not in path.name]


def places_of(name: str, component: str | None) -> Iterator[tuple[ModulePath, int | None]]:
    """The places whose weight a tensor is, three with their thirds for a fused one; none where no adapter can sit.

    `component` is given for a file of a diffusers folder, None for one file that holds all.
    """
    if component is None:
        prefix, component = next(((p, c) for p, c in PREFIXES if name.startswith(p)), ("", None))
        name = name.removeprefix(prefix)
        if component is None:
            return
    if component != "unet" and (found := OPEN_CLIP.fullmatch(name)):
        layer = f"encoder.layers.{found[1]}"
        if found[3]:
            yield ModulePath(component, f"{layer}.{OPEN_CLIP_LAYERS[found[3]]}"), None
        else:
            for third, letter in enumerate("qkv"):
                yield ModulePath(component, f"{layer}.self_attn.{letter}_proj"), third
        return
    if not name.endswith(".weight"):
        return
    path = name.removesuffix(".weight")
    try:
        path = diffusers_path(path) if component == "unet" else path.removeprefix("text_model.")
    except (KeyError, ValueError):  # under a name of the original code that no adapter can have
        return
    if (UNET_LAYER if component == "unet" else TEXT_LAYER).fullmatch(path):
        yield ModulePath(component, path), None
