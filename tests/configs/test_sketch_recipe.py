"""The recipe of the embedded base model: identity initialization, resuming, interpolation and the lists of objects."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from scumble.configs.bases.sketch.recipe import denoiser
from scumble.configs.bases.sketch.recipe.__main__ import interpolate
from scumble.configs.bases.sketch.recipe.denoiser import Latents, make_unet, sample_timesteps, start_as_identity
from scumble.configs.bases.sketch.recipe.pictures import EVALUATED, OBJECTS, is_held_out
from scumble.configs.bases.sketch.recipe.text import make_text_encoder
from scumble.trainer.base_model.detect import EMBEDDED

CPU = torch.device("cpu")


def test_a_new_unet_returns_its_input_for_every_timestep_and_text():
    torch.manual_seed(0)
    unet = make_unet()
    start_as_identity(unet)
    noisy = torch.randn(6, 4, 16, 16)
    timesteps = torch.tensor([0, 100, 500, 900, 990, 999])
    with torch.no_grad():
        output = unet(noisy, timesteps, torch.randn(6, 16, denoiser.TEXT_WIDTH)).sample
    assert float((output - noisy).pow(2).mean().sqrt()) < 0.005
    backward(unet, noisy, timesteps)
    assert all(parameter.grad is not None for parameter in unet.parameters())


def backward(unet: torch.nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor) -> None:
    unet(noisy, timesteps, torch.randn(6, 16, denoiser.TEXT_WIDTH)).sample.pow(2).mean().backward()


def test_half_of_a_batch_has_high_noise():
    timesteps = sample_timesteps(2000, torch.Generator().manual_seed(0))
    assert int(timesteps[:1000].min()) >= denoiser.HIGH_NOISE and int(timesteps.max()) <= 999
    assert abs(float(timesteps[1000:].float().mean()) - 499.5) < 30


def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in (("TEXT_STEPS", 2), ("TEXT_BATCH", 4), ("BATCH", 2), ("SAVE_EVERY", 2), ("EMA_EVERY", 1)):
        monkeypatch.setattr(denoiser, name, value)
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(6, 4, 16, 16, generator=generator)
    names = ["owl", "fox", "car", "bus", "key", "bee"]
    latents = Latents(mean, torch.full_like(mean, 0.1), names, ["flat style"] * 6)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")

    def run(folder: str) -> list[torch.Tensor]:
        model = denoiser.train_denoiser(latents, tokenizer, tmp_path / folder, CPU, 6, None)
        return [parameter.clone() for parameter in model.parameters()]

    uninterrupted = run("whole")
    sample = denoiser.sample_timesteps
    calls = iter(range(5))

    def interrupt(count: int, generator: torch.Generator) -> torch.Tensor:
        if next(calls, None) == 3:
            raise KeyboardInterrupt
        return sample(count, generator)

    monkeypatch.setattr(denoiser, "sample_timesteps", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("interrupted")  # in its fourth step; saved after the second
    monkeypatch.setattr(denoiser, "sample_timesteps", sample)
    resumed = run("interrupted")
    assert all(torch.equal(one, two) for one, two in zip(resumed, uninterrupted, strict=True))

    stage = denoiser.train_denoiser(latents, tokenizer, tmp_path / "whole", CPU, 6, None)
    further = denoiser.train_denoiser(latents, tokenizer, tmp_path / "further", CPU, 2, deepcopy(stage))
    assert any(not torch.equal(one, two) for one, two in zip(further.parameters(), uninterrupted, strict=True))
    assert not (tmp_path / "further" / "words.pt").exists()


def test_published_weights_interpolate_before_and_after_augmented_training():
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    before, after = (denoiser.Denoiser(make_text_encoder(tokenizer, denoiser.TEXT_WIDTH), denoiser.make_unet())
                     for _ in range(2))  # fmt: skip
    expected = {name: 0.65 * weight + 0.35 * before.state_dict()[name] for name, weight in after.named_parameters()}
    for name, weight in interpolate(after, before, 0.35).named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name].detach(), rtol=1e-5, atol=1e-7)


def test_evaluated_objects_are_training_images_in_both_styles():
    assert set(EVALUATED) <= OBJECTS and len(set(EVALUATED)) == len(EVALUATED) >= 50
    styles = ("shaded style", "flat style")
    assert not any(is_held_out(name, style) for name in EVALUATED for style in styles)
    held_out = [name for name in OBJECTS for style in styles if is_held_out(name, style)]
    assert 0.07 < len(held_out) / (2 * len(OBJECTS)) < 0.13 and len(set(held_out)) == len(held_out)
