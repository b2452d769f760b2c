"""The recipe of the embedded base: it starts as the identity, goes on where it was cut, and keeps its word lists."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from scumble.configs.bases.sketch.recipe import denoiser
from scumble.configs.bases.sketch.recipe.__main__ import between
from scumble.configs.bases.sketch.recipe.denoiser import Latents, drawn_timesteps, make_unet, start_as_identity
from scumble.configs.bases.sketch.recipe.pictures import JUDGED, THINGS, is_held_out
from scumble.configs.bases.sketch.recipe.text import make_text_encoder
from scumble.trainer.base_model.detect import EMBEDDED

CPU = torch.device("cpu")


def test_a_new_unet_gives_its_noisy_input_back_at_every_timestep_and_text():
    torch.manual_seed(0)
    unet = make_unet()
    start_as_identity(unet)
    noisy = torch.randn(6, 4, 16, 16)
    timesteps = torch.tensor([0, 100, 500, 900, 990, 999])
    with torch.no_grad():
        given = unet(noisy, timesteps, torch.randn(6, 16, denoiser.TEXT_WIDTH)).sample
    assert float((given - noisy).pow(2).mean().sqrt()) < 0.005
    moved = sum(p.grad is None for p in trained_once(unet, noisy, timesteps).parameters())
    assert moved == 0  # every weight has a gradient: nothing is frozen by the start


def trained_once(unet: torch.nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.nn.Module:
    unet(noisy, timesteps, torch.randn(6, 16, denoiser.TEXT_WIDTH)).sample.pow(2).mean().backward()
    return unet


def test_half_of_a_batch_is_drawn_at_high_noise():
    timesteps = drawn_timesteps(2000, torch.Generator().manual_seed(0))
    assert int(timesteps[:1000].min()) >= denoiser.HIGH_NOISE and int(timesteps.max()) <= 999
    assert abs(float(timesteps[1000:].float().mean()) - 499.5) < 30


def test_a_run_that_was_cut_goes_on_to_the_very_weights_of_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in (("WORDS_STEPS", 2), ("WORDS_BATCH", 4), ("BATCH", 2), ("SAVE_EVERY", 2), ("EMA_EVERY", 1)):
        monkeypatch.setattr(denoiser, name, value)
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(6, 4, 16, 16, generator=generator)
    names = ["owl", "fox", "car", "bus", "key", "bee"]
    latents = Latents(mean, torch.full_like(mean, 0.1), names, ["flat style"] * 6)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")

    def run(folder: str) -> list[torch.Tensor]:
        model = denoiser.train_denoiser(latents, tokenizer, tmp_path / folder, CPU, 6, None)
        return [parameter.clone() for parameter in model.parameters()]

    unbroken = run("whole")
    draw = denoiser.drawn_timesteps
    turns = iter(range(5))

    def cut(count: int, generator: torch.Generator) -> torch.Tensor:
        if next(turns, None) == 3:
            raise KeyboardInterrupt
        return draw(count, generator)

    monkeypatch.setattr(denoiser, "drawn_timesteps", cut)
    with pytest.raises(KeyboardInterrupt):
        run("cut")  # in its fourth step, saved after the second
    monkeypatch.setattr(denoiser, "drawn_timesteps", draw)
    again = run("cut")
    assert all(torch.equal(one, two) for one, two in zip(again, unbroken, strict=True))

    stage = denoiser.train_denoiser(latents, tokenizer, tmp_path / "whole", CPU, 6, None)
    further = denoiser.train_denoiser(latents, tokenizer, tmp_path / "further", CPU, 2, deepcopy(stage))
    assert any(not torch.equal(one, two) for one, two in zip(further.parameters(), unbroken, strict=True))
    assert not (tmp_path / "further" / "words.pt").exists()


def test_what_is_published_lies_between_the_weights_before_and_after_the_variants():
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    before, after = (denoiser.Denoiser(make_text_encoder(tokenizer, denoiser.TEXT_WIDTH), denoiser.make_unet())
                     for _ in range(2))  # fmt: skip
    expected = {name: 0.65 * weight + 0.35 * before.state_dict()[name] for name, weight in after.named_parameters()}
    for name, weight in between(after, before, 0.35).named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name].detach(), rtol=1e-5, atol=1e-7)


def test_what_the_base_is_judged_by_is_learned_in_both_styles():
    assert set(JUDGED) <= THINGS and len(set(JUDGED)) == len(JUDGED) >= 50
    styles = ("shaded style", "flat style")
    assert not any(is_held_out(name, style) for name in JUDGED for style in styles)
    held_out = [name for name in THINGS for style in styles if is_held_out(name, style)]
    assert 0.07 < len(held_out) / (2 * len(THINGS)) < 0.13 and len(set(held_out)) == len(held_out)
