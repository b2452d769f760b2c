"""The config folders of the public bases contain the original tokenizers and describe models of the published sizes.

Parameters are counted on the meta device, without allocating weights.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from paths import CHECKOUT
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

BASES = CHECKOUT / "configs" / "bases"
BETAS = (0.00085, 0.012, "scaled_linear")
END = 49407  # <|endoftext|>
PADDING = {
    "sd15/tokenizer": END,
    "sd21/tokenizer": 0,  # OpenCLIP pads with !, whose id is 0
    "sd21-v/tokenizer": 0,
    "sdxl/tokenizer": END,
    "sdxl/tokenizer_2": 0,
}
ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def layers(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def model_without_weights(folder: Path) -> nn.Module:
    """The model described by config.json in a folder, on the meta device."""
    with torch.device("meta"):
        if folder.name in ENCODERS:
            return ENCODERS[folder.name](CLIPTextConfig.from_pretrained(folder))
        kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[folder.name]
        model = kind.from_config(read(folder / "config.json"))
        assert isinstance(model, nn.Module)
        return model


# --- tokenizers


@pytest.fixture(scope="module", params=PADDING)
def tokenizer(request: pytest.FixtureRequest) -> tuple[str, CLIPTokenizer]:
    return request.param, CLIPTokenizer.from_pretrained(BASES / request.param, local_files_only=True)


def test_every_tokenizer_returns_the_published_ids(tokenizer: tuple[str, CLIPTokenizer]):
    _, tokenize = tokenizer
    assert len(tokenize) == 49408
    assert tokenize("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, END]
    assert tokenize("A  Photo\nof a CAT").input_ids == tokenize("a photo of a cat").input_ids
    # as in OpenAI's tokenizer: non-ASCII letters as bytes, digits one by one
    mixed = [3459, 21259, 39121, 19277, 361, 267, 585, 568, 275, 273]
    assert tokenize("Éà 日本, it's 42").input_ids[1:-1] == mixed


def test_every_tokenizer_pads_to_77_with_the_padding_token_of_its_encoder(
    tokenizer: tuple[str, CLIPTokenizer],
):
    name, tokenize = tokenizer
    assert tokenize.model_max_length == 77
    ids = tokenize("a photo of a cat", padding="max_length", truncation=True, max_length=77).input_ids
    assert ids[:7] == [49406, 320, 1125, 539, 320, 2368, END]
    assert ids[7:] == [PADDING[name]] * 70
    assert tokenize("cat " * 100, padding="max_length", truncation=True).input_ids[-2:] == [2368, END]


def test_an_exclamation_mark_becomes_padding_if_the_padding_token_is_an_exclamation_mark(
    tokenizer: tuple[str, CLIPTokenizer],
):
    name, tokenize = tokenizer  # like the published tokenizers; the regular token is 256
    assert tokenize("wow!").input_ids == [49406, 2781, 256 if PADDING[name] == END else 0, END]


def test_all_tokenizers_have_the_same_vocabulary():
    for file in ("vocab.json", "merges.txt"):
        assert len({(BASES / name / file).read_bytes() for name in PADDING}) == 1
    vocabulary = read(BASES / "sd15/tokenizer/vocab.json")
    merges = (BASES / "sd15/tokenizer/merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert list(vocabulary.values()) == list(range(49408))
    assert list(vocabulary)[512:-2] == [pair.replace(" ", "") for pair in merges]


# --- sizes


@pytest.mark.parametrize(
    ("part", "size"),
    [
        ("sd15/unet", 859_520_964),
        ("sd15/text_encoder", 123_060_480),
        ("sd15/vae", 83_653_863),
        ("sd21/unet", 865_910_724),
        ("sd21/text_encoder", 340_387_840),
        ("sd21/vae", 83_653_863),
        ("sd21-v/unet", 865_910_724),
        ("sd21-v/text_encoder", 340_387_840),
        ("sd21-v/vae", 83_653_863),
        ("sdxl/unet", 2_567_463_684),
        ("sdxl/text_encoder", 123_060_480),
        ("sdxl/text_encoder_2", 694_659_840),
        ("sdxl/vae", 83_653_863),
    ],
)
def test_every_component_has_the_published_number_of_parameters(part: str, size: int):
    assert parameters(model_without_weights(BASES / part)) == size


@pytest.mark.parametrize(
    ("base", "attention", "with_convolutions"),
    [("sd15", 192, 278), ("sd21", 192, 278), ("sd21-v", 192, 278), ("sdxl", 722, 788)],
)
def test_the_unets_have_the_expected_number_of_lora_targets(base: str, attention: int, with_convolutions: int):
    """Attention: each Linear or Conv2d inside an `attentions` block (to_q, to_k, to_v, to_out.0, both ff layers,
    proj_in, proj_out). With convolutions: all layers of the down, middle and up blocks, including conv1, conv2,
    conv_shortcut and time_emb_proj of resnets and conv of samplers, but not conv_in, conv_out, time_embedding and
    add_embedding."""
    names = layers(model_without_weights(BASES / base / "unet"))
    assert sum(".attentions." in name for name in names) == attention
    blocks = ("down_blocks.", "mid_block.", "up_blocks.")
    assert sum(name.startswith(blocks) for name in names) == with_convolutions


@pytest.mark.parametrize(
    ("part", "count"),
    [
        ("sd15/text_encoder", 72),
        ("sd21/text_encoder", 138),
        ("sd21-v/text_encoder", 138),
        ("sdxl/text_encoder", 72),
        ("sdxl/text_encoder_2", 192),
    ],
)
def test_the_text_encoders_have_six_lora_targets_per_block(part: str, count: int):
    names = [name for name in layers(model_without_weights(BASES / part)) if ".layers." in f".{name}"]
    assert len(names) == count == 6 * read(BASES / part / "config.json")["num_hidden_layers"]


# --- settings


@pytest.mark.parametrize(
    ("base", "kind", "prediction", "latent_px", "scaling"),
    [
        ("sd15", "PNDMScheduler", "epsilon", 64, 0.18215),
        ("sd21", "PNDMScheduler", "epsilon", 64, 0.18215),
        ("sd21-v", "DDIMScheduler", "v_prediction", 96, 0.18215),
        ("sdxl", "EulerDiscreteScheduler", "epsilon", 128, 0.13025),
    ],
)
def test_every_base_has_its_noise_schedule_resolution_and_scaling_factor(
    base: str, kind: str, prediction: str, latent_px: int, scaling: float
):
    schedule = read(BASES / base / "scheduler/scheduler_config.json")
    assert (schedule["_class_name"], schedule["prediction_type"]) == (kind, prediction)
    assert (schedule["beta_schedule"], schedule["beta_start"], schedule["beta_end"]) == (
        "scaled_linear",
        0.00085,
        0.012,
    )
    assert (schedule["steps_offset"], schedule["set_alpha_to_one"]) == (1, False)
    assert read(BASES / base / "unet/config.json")["sample_size"] == latent_px
    assert read(BASES / base / "vae/config.json")["scaling_factor"] == scaling


def test_the_sdxl_index_and_unet_config_match_the_published_files_byte_for_byte():
    digests = {
        "model_index.json": "a40ca00944bb33ea9281580f50d009d1e23a434173c0e4e234bb90bd75178874",
        "unet/config.json": "30ebc70750223e59006f7f2b4e1e6c102570aa19a9c4ae3e1fbe7591332dbae6",
    }
    for file, digest in digests.items():
        assert hashlib.sha256((BASES / "sdxl" / file).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("base", ["sd15", "sd21", "sd21-v", "sdxl"])
def test_diffusers_reads_every_index_and_finds_a_config_for_each_component(base: str):
    index = DiffusionPipeline.load_config(str(BASES / base), local_files_only=True)
    assert isinstance(index, dict)
    listed = {name for name, part in index.items() if isinstance(part, list | tuple) and part[0]}
    assert listed == {folder.name for folder in (BASES / base).iterdir() if folder.is_dir()}
    for name in listed:
        kind = name.removesuffix("_2")
        file = {"scheduler": "scheduler_config", "tokenizer": "tokenizer_config"}.get(kind, "config")
        assert read(BASES / base / name / f"{file}.json")
