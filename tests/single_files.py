"""Single-file checkpoints with random weights, in the layout in which they are distributed."""

import json
import re
import shutil
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from paths import CHECKOUT
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

BASES = CHECKOUT / "configs" / "bases"
PIPELINES: dict[str, type[StableDiffusionPipeline | StableDiffusionXLPipeline]] = {
    "sd15": StableDiffusionPipeline,
    "sd21": StableDiffusionPipeline,
    "sd21-v": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
}
ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
TEXT_PREFIXES = {
    ("sd15", "text_encoder"): ("cond_stage_model.transformer.text_model.", False),
    ("sd21", "text_encoder"): ("cond_stage_model.model.", True),
    ("sd21-v", "text_encoder"): ("cond_stage_model.model.", True),
    ("sdxl", "text_encoder"): ("conditioner.embedders.0.transformer.text_model.", False),
    ("sdxl", "text_encoder_2"): ("conditioner.embedders.1.model.", True),
}


def renamed(weights: dict[str, Tensor], prefix: str, names: dict[str, str]) -> dict[str, Tensor]:
    """Replace parts of the weights' names according to `names`, in order, and add a prefix."""
    theirs = {}
    for name, weight in weights.items():
        for ours, other in names.items():
            name = name.replace(ours, other)
        theirs[prefix + name] = weight
    return theirs


def ldm_unet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    for k in (1, 2):
        names |= {f"time_embedding.linear_{k}": f"time_embed.{2 * k - 2}"}
        names |= {f"add_embedding.linear_{k}": f"label_emb.0.{2 * k - 2}"}
    for i in range(4):
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{3 * i + 3}.0.op"
        after = 2 if f"up_blocks.{i}.attentions.0.norm.weight" in weights else 1
        names[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{3 * i + 2}.{after}"
        for j in range(3):
            for k, kind in enumerate(("resnets", "attentions")):
                names[f"down_blocks.{i}.{kind}.{j}"] = f"input_blocks.{3 * i + j + 1}.{k}"
                names[f"up_blocks.{i}.{kind}.{j}"] = f"output_blocks.{3 * i + j}.{k}"
    names |= {"mid_block.attentions.0": "middle_block.1"}
    names |= {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
    resnet |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    # Transformer blocks also contain norm1 and norm2, so resnet names are replaced only outside attention.
    attention = {name: weight for name, weight in weights.items() if ".attentions." in name}
    others = {name: weight for name, weight in weights.items() if ".attentions." not in name}
    prefix = "model.diffusion_model."
    return renamed(attention, prefix, names) | renamed(others, prefix, names | resnet)


def ldm_vae(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {f"up_blocks.{i}": f"up.{3 - i}" for i in range(4)}  # the decoder numbers its blocks in reverse
    names |= {f"down_blocks.{i}": f"down.{i}" for i in range(4)}
    names |= {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"}
    names |= {"mid_block.attentions.0": "mid.attn_1", "resnets": "block", "downsamplers.0": "downsample"}
    names |= {"upsamplers.0": "upsample", "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"}
    names |= {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    theirs = renamed(weights, "first_stage_model.", names)
    attention = re.compile(r"\.(q|k|v|proj_out)\.weight$")  # 1x1 convolutions in LDM
    for name in filter(attention.search, theirs):
        theirs[name] = theirs[name][:, :, None, None]
    return theirs


def open_clip(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    weights = dict(weights)
    for query in [name for name in weights if ".q_proj." in name]:  # fused into one matrix in OpenCLIP
        parts = [weights.pop(query.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        weights[query.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    if "text_projection.weight" in weights:
        weights["text_projection"] = weights.pop("text_projection.weight").T.contiguous()
    names = {"encoder.layers": "transformer.resblocks", "self_attn": "attn", "mlp.fc1": "mlp.c_fc"}
    names |= {"mlp.fc2": "mlp.c_proj", "final_layer_norm": "ln_final", "layer_norm": "ln_"}
    names |= {"embeddings.position_embedding.weight": "positional_embedding", "embeddings.token": "token"}
    return renamed(weights, prefix, names)


def narrow(base: str, folder: Path) -> Path:
    """Copy a base's config folder with the same depth and a twentieth of the width, small enough for random weights."""
    shutil.copytree(BASES / base, folder)

    def change(part: str, **settings: object) -> None:
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    hidden = {"text_encoder": 32, "text_encoder_2": 64}  # text encoders are identified by width
    hidden = {name: width for name, width in hidden.items() if (folder / name).is_dir()}
    for name, width in hidden.items():
        change(name, hidden_size=width, intermediate_size=96, num_attention_heads=2, projection_dim=width)
    widths = [16, 32, 64] if base == "sdxl" else [16, 32, 64, 64]
    change("unet", block_out_channels=widths, norm_num_groups=16, cross_attention_dim=sum(hidden.values()))
    change("unet", attention_head_dim=4)
    if base == "sdxl":  # pooled text embedding and six time ids
        change("unet", projection_class_embeddings_input_dim=hidden["text_encoder_2"] + 6 * 256)
    change("vae", block_out_channels=[16, 16, 32, 32], norm_num_groups=16)
    return folder


def random_parts(base: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Random weights of every part of a base, by part, under diffusers and transformers names."""
    torch.manual_seed(0)
    parts = {}
    for name, kind in {"unet": UNet2DConditionModel, "vae": AutoencoderKL}.items():
        model = kind.from_config(json.loads((folder / name / "config.json").read_text()))
        assert isinstance(model, torch.nn.Module)
        parts[name] = parameters_of(model)
    for name, kind in ENCODERS.items():
        if (base, name) in TEXT_PREFIXES:
            parts[name] = parameters_of(kind(CLIPTextConfig.from_pretrained(folder / name)))
    return parts


def parameters_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights by name, without the prefix `text_model.`, which transformers >= 5.6 omits in some models."""
    return {name.removeprefix("text_model."): weight.detach() for name, weight in model.named_parameters()}


def one_file(base: str, parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    weights = ldm_unet(parts["unet"]) | ldm_vae(parts["vae"])
    for (owner, name), (prefix, is_open_clip) in TEXT_PREFIXES.items():
        if owner == base:
            weights |= open_clip(parts[name], prefix) if is_open_clip else renamed(parts[name], prefix, {})
    return {name: weight.contiguous() for name, weight in weights.items()}
