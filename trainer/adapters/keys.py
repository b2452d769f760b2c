"""Module paths <-> adapter keys: kohya's names, which ComfyUI, A1111, Forge, InvokeAI and diffusers all read.

`{prefix}_{path with . as _}.lora_down.weight`, `.lora_up.weight`, `.alpha`. SD 1 and 2 keep diffusers' block names;
SDXL takes those of the original sgm code, because diffusers' lose modules in A1111.
"""

import re

RESNET_SUFFIXES = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def unet_key(path: str, sgm: bool) -> str:
    """Key stem of a UNet module at diffusers' `path`; `sgm` for SDXL."""
    return "lora_unet_" + (sgm_path(path) if sgm else path).replace(".", "_")


def text_key(path: str, prefix: str) -> str:
    """Key stem of a text encoder's module; `text_model.` is put in front where transformers (>= 5.6) leaves it out."""
    return f"{prefix}_text_model_" + path.removeprefix("text_model.").replace(".", "_")


def sgm_path(path: str) -> str:
    """SDXL's name in the sgm code of a UNet module at diffusers' `path`.

    down_blocks.i.resnets.j -> input_blocks.{3i+j+1}.0, attentions.j -> input_blocks.{3i+j+1}.1, downsamplers ->
    input_blocks.{3(i+1)}.0.op, up_blocks.i.resnets.j -> output_blocks.{3i+j}.0, attentions.j ->
    output_blocks.{3i+j}.1, upsamplers -> output_blocks.{3i+2}.2.conv, mid_block -> middle_block.{0, 1, 2}.
    """
    part, _, rest = path.partition(".")
    if part in ("time_embedding", "add_embedding"):
        stem = "time_embed" if part == "time_embedding" else "label_emb.0"
        return f"{stem}.{2 * (int(rest.removeprefix('linear_')) - 1)}"
    if part in ("conv_in", "conv_out"):
        return {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}[part]
    if part == "mid_block":
        kind, index, inner = rest.split(".", 2)
        block = 1 if kind == "attentions" else 2 * int(index)
        return f"middle_block.{block}.{_inside(kind, inner)}"
    i, kind, j, inner = _numbered(rest)
    down = part == "down_blocks"
    if kind == "downsamplers":
        return f"input_blocks.{3 * (i + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * i + 2}.2.conv"
    place = f"input_blocks.{3 * i + j + 1}" if down else f"output_blocks.{3 * i + j}"
    return f"{place}.{int(kind == 'attentions')}.{_inside(kind, inner)}"


def _numbered(rest: str) -> tuple[int, str, int, str]:
    found = re.fullmatch(r"(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", rest)
    assert found, rest
    return int(found[1]), found[2], int(found[3]), found[4]


def _inside(kind: str, inner: str) -> str:
    return RESNET_SUFFIXES[inner] if kind == "resnets" else inner
