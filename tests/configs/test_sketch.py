"""The embedded base model: stock diffusers loads it, it follows the text, and the metrics in its README are correct."""

import json

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from paths import CHECKOUT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from scumble.configs.bases.sketch.recipe.denoiser import Denoiser, Latents, held_out_loss
from scumble.configs.bases.sketch.recipe.judge import generate_latents, share_nearest
from scumble.configs.bases.sketch.recipe.pictures import EVALUATED

BASE = CHECKOUT / "configs/bases/sketch"
SAMPLES = CHECKOUT / "datasets/samples"
METRICS = json.loads((BASE / "figures.json").read_text())
STYLES = ["shaded style", "flat style"]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(BASE)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def references() -> dict[str, torch.Tensor]:
    return load_file(BASE / "references.safetensors")


@pytest.fixture(scope="module")
def generated(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    return {style: generate_latents(pipeline, [f"{name}, {style}" for name in EVALUATED]) for style in STYLES}


def test_its_weights_are_fp16_safetensors_below_40_mb():
    weights = [path for path in BASE.rglob("*.safetensors") if path.name != "references.safetensors"]
    assert len(weights) == 3
    assert sum(path.stat().st_size for path in weights) <= 40_000_000
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118


def test_it_is_a_stable_diffusion_with_cross_attention_at_two_levels(pipeline: StableDiffusionPipeline):
    assert isinstance(pipeline.text_encoder, CLIPTextModel) and isinstance(pipeline.tokenizer, CLIPTokenizer)
    assert sum("CrossAttn" in kind for kind in pipeline.unet.config.down_block_types) >= 2
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert pipeline.vae.config.latent_channels == 4 and pipeline.vae_scale_factor == 4
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == 64


def test_stock_diffusers_generates_an_image(pipeline: StableDiffusionPipeline):
    image = pipeline("tiger, flat style", num_inference_steps=4, generator=torch.manual_seed(0)).images[0]
    assert image.size == (64, 64)
    assert len(image.getcolors(64 * 64) or []) > 100


@pytest.mark.parametrize("style", STYLES)
def test_a_generated_image_is_nearest_to_the_reference_of_its_prompt(
    style: str, generated: dict[str, torch.Tensor], references: dict[str, torch.Tensor]
):
    share = share_nearest(generated[style], references[style])
    assert len(EVALUATED) >= 50
    assert share == pytest.approx(METRICS[f"nearest_{style.split()[0]}"], abs=0.1)
    assert share >= 0.9  # a random guess gives 1 in 68


@pytest.mark.parametrize("style", STYLES)
def test_the_style_in_the_prompt_changes_the_style(
    style: str, generated: dict[str, torch.Tensor], references: dict[str, torch.Tensor]
):
    other = STYLES[1 - STYLES.index(style)]
    own, far = ((generated[style] - references[name].float()).flatten(1).norm(dim=1) for name in (style, other))
    own_share = float((own < far).float().mean())
    assert own_share == pytest.approx(METRICS[f"style_{style.split()[0]}"], abs=0.1)
    assert own_share >= 0.9  # a random guess gives one half


@pytest.mark.parametrize("word", ["red apple", "tiger", "rocket", "princess"])
def test_required_objects_are_recognizable_in_both_styles(
    word: str, generated: dict[str, torch.Tensor], references: dict[str, torch.Tensor]
):
    index = EVALUATED.index(word)
    for style in STYLES:
        distances = (references[style].float() - generated[style][index]).flatten(1).norm(dim=1)
        assert int(distances.argmin()) == index, style


def test_the_held_out_loss_equals_the_published_value(
    pipeline: StableDiffusionPipeline, references: dict[str, torch.Tensor]
):
    captions = (BASE / "held_out.txt").read_text(encoding="utf-8").splitlines()
    names, styles = zip(*(caption.rsplit(", ", 1) for caption in captions), strict=True)
    mean = references["held_out"].float()
    latents = Latents(mean, torch.zeros_like(mean), list(names), list(styles))
    model = Denoiser(pipeline.text_encoder, pipeline.unet).eval()
    assert held_out_loss(model, latents, pipeline.tokenizer) == pytest.approx(METRICS["held_out_loss"], rel=0.01)


def test_a_tenth_is_held_out_without_the_objects_of_the_demo():
    captions = (BASE / "held_out.txt").read_text(encoding="utf-8").splitlines()
    names = [caption.rsplit(", ", 1)[0] for caption in captions]
    assert len(set(names)) == len(names) >= 60  # at most one style of an object is held out
    assert not {"red apple", "tiger", "rocket", "princess"} & set(names)


def test_its_vae_reconstructs_images_in_an_unseen_style(pipeline: StableDiffusionPipeline):
    errors = []
    for path in sorted((SAMPLES / "clay-style").glob("*.webp")):
        image = Image.open(path).convert("RGBA").resize((64, 64), Image.Resampling.LANCZOS)
        background = Image.new("RGBA", image.size, "white")
        pixels = pipeline.image_processor.preprocess(Image.alpha_composite(background, image).convert("RGB"))
        with torch.no_grad():
            output = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample
        errors.append(((output.clamp(-1, 1) - pixels) / 2).pow(2).mean())
    psnr_db = -10 * torch.stack(errors).log10()
    assert float(psnr_db.mean()) >= 26


def test_its_tokenizer_has_clips_layout_and_loses_no_text(pipeline: StableDiffusionPipeline):
    tokenizer = pipeline.tokenizer
    ids = tokenizer("red apple, flat style").input_ids
    assert ids[0] == tokenizer.bos_token_id == len(tokenizer) - 2
    assert ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id == len(tokenizer) - 1
    text = "zwx Ünïcode 日本 style!"
    decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.lower().replace(" ", "")
