"""Convert between module paths and adapter keys in every dialect in use. A grammar parses keys; layers are not listed.

Module path: a component (unet, text, text2) and the diffusers path in it, without `text_model.` for text encoders.
kohya: `{prefix}_{path with . as _}.lora_down.weight`, `.lora_up.weight`, `.alpha`. ComfyUI, A1111, Forge, InvokeAI and
diffusers all read it. SD 1 and 2 use diffusers block names; SDXL uses those of the original sgm code, because A1111
drops modules under diffusers names. PEFT: `{component}.{path}.lora_A.weight`, `.lora_B.weight`.
"""

import re
from dataclasses import dataclass

RESNET_SUFFIXES = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
COMPONENT_PREFIXES = {"unet": "unet", "text": "text_encoder", "text2": "text_encoder_2"}  # PEFT files of diffusers

# All names that occur in module paths. Longer names must come before their prefixes.
ATOMS = (
    "down_blocks", "up_blocks", "mid_block", "input_blocks", "output_blocks", "middle_block", "transformer_blocks",
    "time_embedding", "time_emb_proj", "time_embed", "add_embedding", "label_emb", "skip_connection", "conv_shortcut",
    "conv_in", "conv_out", "in_layers", "out_layers", "emb_layers", "proj_in", "proj_out", "to_q", "to_k", "to_v",
    "to_out", "linear_1", "linear_2", "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj",
    "text_projection", "attentions", "resnets", "downsamplers", "upsamplers", "attn1", "attn2", "ff", "net", "proj",
    "conv1", "conv2", "conv", "op", "out", "encoder", "layers", "mlp", "fc1", "fc2",
)  # fmt: skip
ATOM = re.compile("|".join([*ATOMS, r"\d+"]))

SLOTS = {
    "lora_down.weight": "lora_down", "lora_up.weight": "lora_up", "lora_mid.weight": "lora_mid", "alpha": "alpha",
    "dora_scale": "dora_scale", "diff": "diff", "diff_b": "diff_b",
    "lora_A.weight": "lora_down", "lora_B.weight": "lora_up", "lora_magnitude_vector.weight": "dora_scale",
    "lora_magnitude_vector": "dora_scale", "lora.down.weight": "lora_down", "lora.up.weight": "lora_up",
    "lora_linear_layer.down.weight": "lora_down", "lora_linear_layer.up.weight": "lora_up",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}  # fmt: skip
SLOT = re.compile(r"^(?P<stem>.+?)\.(?P<slot>" + "|".join(map(re.escape, sorted(SLOTS, key=len, reverse=True))) + r")$")
UNET_LAYER = re.compile(
    r"(down|up)_blocks\.\d+\.((downsamplers|upsamplers)\.0\.conv|attentions\.\d+\.[\w.]+|resnets\.\d+\.RESNET)"
    r"|mid_block\.(attentions\.0\.[\w.]+|resnets\.[01]\.RESNET)|(time|add)_embedding\.linear_[12]|conv_(in|out)"
    .replace("RESNET", f"({'|'.join(RESNET_SUFFIXES)})")
)  # fmt: skip
OLD_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")  # pre-PEFT diffusers


@dataclass(frozen=True, order=True)
class ModulePath:
    """A layer that an adapter can modify: `component` is unet, text or text2; `path` is the diffusers path in it."""

    component: str
    path: str

    def __str__(self) -> str:
        return f"{self.component}.{self.path}"

    @property
    def block(self) -> str:
        """Block of the layer: `down_blocks.1`, `mid_block`, `up_blocks.0`, another UNet module, `text` or `text2`."""
        if self.component != "unet":
            return self.component
        first, _, rest = self.path.partition(".")
        return f"{first}.{rest.partition('.')[0]}" if first in ("down_blocks", "up_blocks") else first


@dataclass(frozen=True)
class Key:
    """A parsed tensor name: its layer, its slot (the role of the tensor there) and its dialect."""

    layer: ModulePath
    slot: str
    dialect: str  # kohya or peft


def unet_key(path: str, sgm: bool) -> str:
    """Return the kohya key stem of the UNet module at diffusers `path`; `sgm` is true for SDXL."""
    return "lora_unet_" + (sgm_path(path) if sgm else path).replace(".", "_")


def text_key(path: str, prefix: str) -> str:
    """Return the key stem of a text encoder module, always with `text_model`, which transformers >= 5.6 omits."""
    return f"{prefix}_text_model_" + path.removeprefix("text_model.").replace(".", "_")


def kohya_stem(layer: ModulePath, family: str) -> str:
    """Return the kohya key stem of a layer for `family` sd1, sd2 or sdxl."""
    if layer.component == "unet":
        return unet_key(layer.path, sgm=family == "sdxl")
    prefix = {"text": "lora_te1", "text2": "lora_te2"}[layer.component] if family == "sdxl" else "lora_te"
    return text_key(layer.path, prefix)


def peft_stem(layer: ModulePath) -> str:
    """Return the key stem that diffusers' `save_lora_weights` writes."""
    inner = layer.path if layer.component == "unet" else f"text_model.{layer.path}"
    return f"{COMPONENT_PREFIXES[layer.component]}.{inner}"


def parse_key(name: str) -> Key | None:
    """Parse a tensor name in any dialect. Returns None if it is not an adapter key."""
    name = OLD_PROCESSOR.sub(_modern, name).replace(".default.", ".")
    found = SLOT.match(name)
    if not found:
        return None
    stem, slot = found["stem"], SLOTS[found["slot"]]
    for prefix, component in (
        ("lora_unet_", "unet"),
        ("lora_te1_", "text"),
        ("lora_te2_", "text2"),
        ("lora_te_", "text"),
    ):
        if stem.startswith(prefix):
            path = unflattened(stem.removeprefix(prefix))
            return None if path is None else _key(component, path, slot, "kohya")
    stem = stem.removeprefix("base_model.model.")
    component = next((ours for ours, theirs in COMPONENT_PREFIXES.items() if stem.startswith(theirs + ".")), None)
    if component is None:  # a single UNet saved by PEFT
        known = stem.startswith(
            ("down_blocks.", "mid_block.", "up_blocks.", "time_embedding.", "add_embedding.", "conv_")
        )
        return _key("unet", stem, slot, "peft") if known else None
    return _key(component, stem.removeprefix(COMPONENT_PREFIXES[component] + "."), slot, "peft")


def unflattened(flat: str) -> str | None:
    """`down_blocks_0_attentions_1_proj_in` -> `down_blocks.0.attentions.1.proj_in`, or None if a name is unknown."""
    parts, position = [], 0
    while position < len(flat):
        found = ATOM.match(flat, position)
        if not found or (found.end() < len(flat) and flat[found.end()] != "_"):
            return None
        parts.append(found[0])
        position = found.end() + 1
    return ".".join(parts)


def sgm_path(path: str) -> str:
    """Return the sgm (LDM) name of the UNet module at diffusers `path`, for two resnets per block.

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
    block = f"input_blocks.{3 * i + j + 1}" if down else f"output_blocks.{3 * i + j}"
    return f"{block}.{int(kind == 'attentions')}.{_inside(kind, inner)}"


def diffusers_path(path: str) -> str:
    """Invert `sgm_path`. A path that is already a diffusers path is returned unchanged."""
    part, _, rest = path.partition(".")
    if part == "time_embed":
        return f"time_embedding.linear_{int(rest) // 2 + 1}"
    if part == "label_emb":
        return f"add_embedding.linear_{int(rest.removeprefix('0.')) // 2 + 1}"
    if path in ("input_blocks.0.0", "out.2"):
        return {"input_blocks.0.0": "conv_in", "out.2": "conv_out"}[path]
    if part not in ("input_blocks", "output_blocks", "middle_block"):
        return path
    if part == "middle_block":
        index, _, inner = rest.partition(".")
        kind = "attentions.0" if index == "1" else f"resnets.{int(index) // 2}"
        return f"mid_block.{kind}.{_outside(kind, inner)}"
    block, index, inner = rest.split(".", 2)
    number = int(block) - (part == "input_blocks")
    i, j = divmod(number, 3)
    if part == "input_blocks" and inner == "op":
        return f"down_blocks.{i}.downsamplers.0.conv"
    if part == "output_blocks" and inner == "conv":
        return f"up_blocks.{i}.upsamplers.0.conv"
    kind = "attentions" if index == "1" else "resnets"
    side = "down_blocks" if part == "input_blocks" else "up_blocks"
    return f"{side}.{i}.{kind}.{j}.{_outside(kind, inner)}"


def _modern(found: re.Match[str]) -> str:
    layer = "to_out.0" if found[1] == "to_out" else found[1]
    return f".{layer}.lora_{'A' if found[2] == 'down' else 'B'}.weight"


def _key(component: str, path: str, slot: str, dialect: str) -> Key | None:
    if component != "unet":
        return Key(ModulePath(component, path.removeprefix("text_model.")), slot, dialect)
    try:
        path = diffusers_path(path)
    except (ValueError, KeyError):  # sgm names in an order that no UNet has
        return None
    return Key(ModulePath(component, path), slot, dialect) if UNET_LAYER.fullmatch(path) else None


def _numbered(rest: str) -> tuple[int, str, int, str]:
    found = re.fullmatch(r"(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", rest)
    assert found, rest
    return int(found[1]), found[2], int(found[3]), found[4]


def _inside(kind: str, inner: str) -> str:
    return RESNET_SUFFIXES[inner] if kind == "resnets" else inner


def _outside(kind: str, inner: str) -> str:
    ours = {theirs: name for name, theirs in RESNET_SUFFIXES.items()}
    return ours[inner] if kind.startswith("resnets") else inner
