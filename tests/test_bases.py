"""The small configs of SD 1.5, 2.1, 2.1-v and SDXL: CLIP's real tokenizer, and layouts of the public models' size."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

BASES = Path(__file__).parent.parent / "configs/bases"
TOKENIZERS = sorted(path.relative_to(BASES) for path in BASES.glob("sd*/tokenizer*"))
ATTENTION_AND_FF = r"attentions\.\d+\.(proj_in|proj_out|.*(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2))$"
CONVS = r"resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)$|(down|up)samplers\.0\.conv$"


def read(path: str) -> dict:
    return json.loads((BASES / path).read_text())


def unet(base: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(read(f"{base}/unet/config.json"))
    assert isinstance(model, UNet2DConditionModel)
    return model


def text_encoder(folder: str) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = read(f"{folder}/config.json")
    kinds = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
    with torch.device("meta"):
        return kinds[config["architectures"][0]](CLIPTextConfig(**config))


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("folder", TOKENIZERS, ids=str)
def test_the_tokenizer_is_clips(folder: Path):
    tokenizer = CLIPTokenizer.from_pretrained(BASES / folder)
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("  A   PHOTO of\na cat ").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("it's 1girl, (best:1.2)").input_ids[1:3] == tokenizer("it 's").input_ids[1:3]


@pytest.mark.parametrize("folder", TOKENIZERS, ids=str)
def test_prompts_are_padded_as_the_public_model_pads_them(folder: Path):
    tokenizer = CLIPTokenizer.from_pretrained(BASES / folder)
    ids = tokenizer("cat", padding="max_length", max_length=77, truncation=True).input_ids
    padding = 0 if str(folder).startswith("sd21") or folder.name == "tokenizer_2" else 49407  # "!" or end of text
    assert ids == [49406, 2368, 49407] + [padding] * 74


@pytest.mark.parametrize(
    ("base", "count", "with_convs", "size"),
    [
        ("sd15", 192, 278, 859_520_964),
        ("sd21", 192, 278, 865_910_724),
        ("sd21-v", 192, 278, 865_910_724),
        ("sdxl", 722, 788, 2_567_463_684),
    ],
)
def test_the_unet_has_the_modules_and_parameters_of_the_public_model(base: str, count: int, with_convs: int, size: int):
    model = unet(base)
    names = [name for name, _ in model.named_modules()]
    found = [name for name in names if re.search(ATTENTION_AND_FF, name)]
    assert len(found) == count
    assert len(found) + sum(bool(re.search(CONVS, name)) for name in names) == with_convs
    assert parameters(model) == size


@pytest.mark.parametrize(
    ("folder", "modules", "size"),
    [
        ("sd15/text_encoder", 72, 123_060_480),
        ("sd21/text_encoder", 138, 340_387_840),
        ("sd21-v/text_encoder", 138, 340_387_840),
        ("sdxl/text_encoder", 72, 123_060_480),
        ("sdxl/text_encoder_2", 192, 694_659_840),
    ],
)
def test_the_text_encoder_has_the_modules_and_parameters_of_the_public_model(folder: str, modules: int, size: int):
    model = text_encoder(folder)
    names = [name for name, _ in model.named_modules()]
    assert (
        sum(bool(re.search(r"(q_proj|k_proj|v_proj|out_proj|mlp\.fc1|mlp\.fc2)$", name)) for name in names) == modules
    )
    assert parameters(model) == size


@pytest.mark.parametrize("base", ["sd15", "sd21", "sd21-v", "sdxl"])
def test_the_vae_is_the_public_one(base: str):
    config = read(f"{base}/vae/config.json")
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    assert isinstance(vae, AutoencoderKL) and parameters(vae) == 83_653_863
    assert config["scaling_factor"] == (0.13025 if base == "sdxl" else 0.18215)


@pytest.mark.parametrize(
    ("base", "prediction"),
    [("sd15", "epsilon"), ("sd21", "epsilon"), ("sd21-v", "v_prediction"), ("sdxl", "epsilon")],
)
def test_the_schedule_is_the_public_one(base: str, prediction: str):
    config = read(f"{base}/scheduler/scheduler_config.json")
    assert (config["beta_start"], config["beta_end"], config["beta_schedule"]) == (0.00085, 0.012, "scaled_linear")
    assert config["prediction_type"] == prediction


@pytest.mark.parametrize("base", ["sd15", "sd21", "sd21-v", "sdxl"])
def test_every_part_that_the_index_names_has_its_folder(base: str):
    index = read(f"{base}/model_index.json")
    parts = {name for name, entry in index.items() if isinstance(entry, list) and entry[0]}
    assert parts == {path.name for path in (BASES / base).iterdir() if path.is_dir()}
