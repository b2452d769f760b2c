"""Adapter keys: every layer of the real layouts survives a round trip through every dialect."""

import json
import re

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from layouts import LAYOUTS, OTHERS
from tiny import CONFIGS
from transformers import CLIPTextConfig, CLIPTextModel

from scumble.trainer.adapters.keys import (
    ModulePath,
    diffusers_path,
    kohya_stem,
    parse_key,
    peft_stem,
    sgm_path,
    unflattened,
)
from scumble.trainer.adapters.targets import CONVS, FULL, TEXT


def unet_paths(family: str, pattern: str) -> list[str]:
    with torch.device("meta"):
        config = json.loads((CONFIGS / LAYOUTS[family] / "unet/config.json").read_text())
        unet = UNet2DConditionModel.from_config(config)
    assert isinstance(unet, UNet2DConditionModel)
    return [name for name, _ in unet.named_modules() if re.fullmatch(pattern, name)]


def text_paths(family: str, part: str) -> list[str]:
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig.from_pretrained(CONFIGS / LAYOUTS[family] / part))
    return [name.removeprefix("text_model.") for name, _ in model.named_modules() if re.fullmatch(TEXT, name)]


def layers(family: str) -> list[ModulePath]:
    found = [ModulePath("unet", path) for path in unet_paths(family, f"{FULL}|{CONVS}|{OTHERS}")]
    found += [ModulePath("text", path) for path in text_paths(family, "text_encoder")]
    if family == "sdxl":
        found += [ModulePath("text2", path) for path in text_paths(family, "text_encoder_2")]
    return found


@pytest.mark.parametrize(("family", "convs", "text"), [("sd1", 278, 72), ("sd2", 278, 138), ("sdxl", 788, 72 + 192)])
def test_every_layer_of_the_real_layouts_survives_a_round_trip_through_both_dialects(
    family: str, convs: int, text: int
):
    known = layers(family)
    others = [layer for layer in known if re.fullmatch(OTHERS, layer.path)]
    assert len(known) == convs + text + len(others) and len(others) == (6 if family == "sdxl" else 4)
    stems = {kohya_stem(layer, family) for layer in known}
    assert len(stems) == len(known)
    for layer in known:
        for name, dialect in (
            (kohya_stem(layer, family) + ".lora_down.weight", "kohya"),
            (peft_stem(layer) + ".lora_A.weight", "peft"),
        ):
            key = parse_key(name)
            assert key and (key.layer, key.slot, key.dialect) == (layer, "lora_down", dialect), name


@pytest.mark.parametrize("family", LAYOUTS)
def test_sgm_names_and_diffusers_names_are_one_to_one_in_every_family(family: str):
    for path in unet_paths(family, f"{FULL}|{CONVS}|{OTHERS}"):
        assert diffusers_path(sgm_path(path)) == path
        assert diffusers_path(path) == path
        assert unflattened(path.replace(".", "_")) == path
        assert unflattened(sgm_path(path).replace(".", "_")) == sgm_path(path)


TO_Q = ModulePath("unet", "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q")
TO_OUT = ModulePath("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0")
Q_PROJ = ModulePath("text", "encoder.layers.3.self_attn.q_proj")
FC1 = ModulePath("text2", "encoder.layers.31.mlp.fc1")


@pytest.mark.parametrize(
    ("name", "layer", "slot"),
    [
        ("lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q.alpha", TO_Q, "alpha"),
        ("lora_unet_input_blocks_2_1_transformer_blocks_0_attn1_to_q.lora_up.weight", TO_Q, "lora_up"),
        ("lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0.dora_scale", TO_OUT, "dora_scale"),
        ("lora_te_text_model_encoder_layers_3_self_attn_q_proj.lora_down.weight", Q_PROJ, "lora_down"),
        ("lora_te1_text_model_encoder_layers_3_self_attn_q_proj.hada_w1_a", Q_PROJ, "hada_w1_a"),
        ("lora_te2_text_model_encoder_layers_31_mlp_fc1.lokr_w2", FC1, "lokr_w2"),
        ("unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.lora_B.weight", TO_Q, "lora_up"),
        ("unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.lora.down.weight", TO_Q, "lora_down"),
        ("unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.processor.to_q_lora.up.weight", TO_Q, "lora_up"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.down.weight", TO_OUT,
         "lora_down"),
        ("base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_A.default.weight", TO_OUT,
         "lora_down"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_magnitude_vector", TO_OUT, "dora_scale"),
        ("text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer.down.weight", Q_PROJ,
         "lora_down"),
        ("text_encoder.encoder.layers.3.self_attn.q_proj.lora_A.weight", Q_PROJ, "lora_down"),
        ("text_encoder_2.text_model.encoder.layers.31.mlp.fc1.lora_B.weight", FC1, "lora_up"),
    ],
)  # fmt: skip
def test_keys_of_every_program_are_parsed(name: str, layer: ModulePath, slot: str):
    key = parse_key(name)
    assert key and (key.layer, key.slot) == (layer, slot)


@pytest.mark.parametrize(
    "name",
    ["model.diffusion_model.out.2.weight",
     "lora_unet_nonsense_block.lora_down.weight", "emb_params",
     "lora_unet_input_blocks_0.alpha", "lora_unet_to_q_to_k.alpha", "lora_unet_mid_block_resnets_9_conv1.alpha",
     "lora_unet_middle_block_0_to_q.alpha", "unet.class_embedding.lora_A.weight", "lora_unet_label_emb_to_q.alpha",
     "../../etc/passwd",
     "lora_te3_text_model_encoder_layers_0_mlp_fc1.alpha", "transformer.blocks.0.attn.to_q.lora_A.weight", ""],
)  # fmt: skip
def test_other_names_are_not_adapter_keys(name: str):
    assert parse_key(name) is None
