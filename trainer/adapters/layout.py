"""The layers of a base, with the shape of each weight, from the headers of its files: no weight is loaded."""

import re
from collections.abc import Iterator
from pathlib import Path

from .files import read_header
from .keys import UNET_LAYER, Place, parse_key

Shape = tuple[int, ...]
FOLDERS = {"unet": "unet", "text": "text_encoder", "text2": "text_encoder_2"}
CLIP_PREFIXES = {
    "cond_stage_model.transformer.": "text",  # SD 1
    "conditioner.embedders.0.transformer.": "text",  # SDXL
}
OPEN_CLIP_PREFIXES = {
    "cond_stage_model.model.transformer.": "text",  # SD 2
    "conditioner.embedders.1.model.transformer.": "text2",  # SDXL
}
OPEN_CLIP_LAYERS = {
    "attn.out_proj.weight": "self_attn.out_proj",
    "mlp.c_fc.weight": "mlp.fc1",
    "mlp.c_proj.weight": "mlp.fc2",
}
TEXT_LAYER = re.compile(r"encoder\.layers\.\d+\.(self_attn|mlp)\.\w+")


def layout_of(place: Path, is_file: bool) -> dict[Place, Shape]:
    """Every Linear and convolution that an adapter may sit on -> shape (out, in) or (out, in, h, w) of its weight."""
    return dict(_of_file(place) if is_file else _of_folder(place))


def _of_folder(folder: Path) -> Iterator[tuple[Place, Shape]]:
    for component, name in FOLDERS.items():
        for file in sorted((folder / name).glob("*.safetensors")):
            for tensor, entry in read_header(file).entries.items():
                path = tensor.removesuffix(".weight").removeprefix("text_model.")
                if path != tensor and _is_layer(component, path, entry.shape):
                    yield Place(component, path), entry.shape


def _of_file(file: Path) -> Iterator[tuple[Place, Shape]]:
    for name, entry in read_header(file).entries.items():
        if name.startswith("model.diffusion_model.") and name.endswith(".weight"):
            path = name.removeprefix("model.diffusion_model.").removesuffix(".weight")
            key = parse_key(f"lora_unet_{path.replace('.', '_')}.alpha")
            if key and _is_layer("unet", key.place.path, entry.shape):
                yield key.place, entry.shape
        for prefix, component in CLIP_PREFIXES.items():
            path = name.removeprefix(prefix).removeprefix("text_model.").removesuffix(".weight")
            if name.startswith(prefix) and name.endswith(".weight") and _is_layer(component, path, entry.shape):
                yield Place(component, path), entry.shape
        for prefix, component in OPEN_CLIP_PREFIXES.items():
            if name.startswith(prefix + "resblocks."):
                for path, shape in _of_open_clip(name.removeprefix(prefix + "resblocks."), entry.shape):
                    yield Place(component, path), shape


def _of_open_clip(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    """`3.attn.in_proj_weight` (3 · width, width) -> the three projections of layer 3; others one to one."""
    number, _, rest = name.partition(".")
    if rest == "attn.in_proj_weight":
        for projection in ("q_proj", "k_proj", "v_proj"):
            yield f"encoder.layers.{number}.self_attn.{projection}", (shape[0] // 3, shape[1])
    elif rest in OPEN_CLIP_LAYERS:
        yield f"encoder.layers.{number}.{OPEN_CLIP_LAYERS[rest]}", shape


def _is_layer(component: str, path: str, shape: Shape) -> bool:
    """Whether an adapter's key can name the layer; a norm or an embedding is none."""
    return len(shape) > 1 and (UNET_LAYER if component == "unet" else TEXT_LAYER).fullmatch(path) is not None
