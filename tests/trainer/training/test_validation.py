"""Held-out images: chosen by content, never trained on, measured as with stock diffusers, no effect on training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from paths import CHECKOUT
from PIL import Image
from runs import SAMPLES, adapter_of, assert_same, interrupted_run, resume_run, train_run

from scumble.configs.errors import Refused
from scumble.configs.options import Options
from scumble.datasets.reading.folder import Example, ImageSet
from scumble.datasets.reading.images import digest_of_file
from scumble.trainer.adapters.files import read_tensors
from scumble.trainer.plan.training_set import hold_out, num_held_out, read_examples
from scumble.trainer.run.loss_plot import loss_curve
from scumble.trainer.run.state import newest_state
from scumble.trainer.training.diffusion import stratified
from scumble.trainer.training.objective import generator_for
from scumble.trainer.training.validation import DRAWS

EMBEDDED = CHECKOUT / "configs/bases/sketch"
FOUR_OF_20: dict[str, Any] = {
    "data": {"validation_split": 0.2},
    "output": {"preview_every": 0, "save_precision": "fp32"},
}


def images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".png", ".webp", ".jpg"))


def held_out(images: Path, **data: Any) -> set[str]:
    options = Options.model_validate({"data": {"images": str(images), "validation_split": 0.2} | data})
    return {example.image.name for example in read_examples(options).examples if example.is_held_out}


def test_the_choice_depends_on_image_content_and_keeps_copies_together(tmp_path: Path):
    folder = tmp_path / "images"
    shutil.copytree(SAMPLES, folder)
    chosen = held_out(folder)
    assert len(chosen) == 4
    trained = next(path for path in images_in(folder) if path.name not in chosen)
    trained.unlink()
    assert held_out(folder) == chosen  # still 4, of 19
    first = min(chosen)
    suffix = Path(first).suffix
    shutil.copy(folder / first, folder / f"copy{suffix}")
    assert held_out(folder) == {*chosen, f"copy{suffix}"}
    (folder / first).rename(folder / f"other_name{suffix}")
    assert held_out(folder) == chosen - {first} | {f"copy{suffix}", f"other_name{suffix}"}


def options_with(split: object) -> Options:
    return Options.model_validate({"data": {"validation_split": split}})


def test_regularization_images_are_kept_and_at_least_one_image_is_held_out_and_one_trained():
    digests = [digest_of_file(path) for path in images_in(SAMPLES)]
    examples = [
        Example(Path(one), "", 3, is_regularization=number > 1, digest=one) for number, one in enumerate(digests)
    ]
    assert hold_out(ImageSet(examples), options_with("off")).examples == examples
    repeats = [example.repeats for example in hold_out(ImageSet(examples), options_with(0.01)).examples]
    assert sorted(repeats[:2]) == [0, 3] and set(repeats[2:]) == {3}
    for split in (0.9, 2):
        with pytest.raises(Refused, match=rf"--validation-split {split}: holds out all 2 images; add images"):
            hold_out(ImageSet(examples), options_with(split))


@pytest.mark.parametrize(
    ("split", "num_images", "expected"),
    [("auto", 7, 0), ("auto", 8, 2), ("auto", 15, 2), ("auto", 16, 4), ("auto", 30, 4), ("auto", 31, 6),
     ("auto", 50, 6), ("auto", 51, 8), ("auto", 5000, 8), (3, 20, 3), (0.2, 20, 4), (0.001, 20, 1)],
)  # fmt: skip
def test_the_number_of_held_out_images_is_a_count_a_share_or_follows_the_size(
    split: Any, num_images: int, expected: int
):
    assert num_held_out(split, num_images) == expected


def test_a_folder_of_validation_images_is_added_and_copies_of_them_are_not_trained_on(tmp_path: Path):
    folder = tmp_path / "validation"
    folder.mkdir()
    shutil.copy(SAMPLES / "fox.webp", folder / "copy.webp")
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    found = read_examples(Options.model_validate({"data": {"images": str(SAMPLES), "validation_split": str(folder)}}))
    out = {example.image.name for example in found.examples if example.is_held_out}
    trained = {example.image.name for example in found.examples if not example.is_held_out}
    assert out == {"copy.webp", "red.png"} and len(trained) == 19 and "fox.webp" not in trained


def test_a_validation_folder_that_holds_every_training_image_is_refused():
    with pytest.raises(Refused, match="contains every training image"):
        read_examples(Options.model_validate({"data": {"images": str(SAMPLES), "validation_split": str(SAMPLES)}}))


def test_a_run_with_held_out_images_equals_a_run_without_these_images(tmp_path: Path):
    measured = train_run(tmp_path / "a", **FOUR_OF_20, network={"lora_dropout": 0.2})
    fewer = tmp_path / "fewer"
    shutil.copytree(SAMPLES, fewer)
    for name in held_out(SAMPLES):
        (fewer / name).unlink()
        (fewer / name).with_suffix(".txt").unlink(missing_ok=True)
    data = {"images": str(fewer), "validation_split": "off"}
    other = train_run(tmp_path / "b", data=data, network={"lora_dropout": 0.2}, output=FOUR_OF_20["output"])
    assert [event["step"] for event in measured.of("validation")] == [0, 3] and not other.of("validation")
    assert measured.losses == other.losses
    assert_same(adapter_of(measured.folder), adapter_of(other.folder))
    counts = [read_tensors(run.folder / "clay.safetensors")[1]["ss_num_train_images"] for run in (measured, other)]
    assert counts == ["16", "16"]
    assert any("20 images in 1 bucket (64x64), 4 of them held out, for sketch" in line
               for line in measured.of("plan")[0]["reasons"])  # fmt: skip


def test_timesteps_are_uniform_in_each_stratum():
    timesteps = torch.arange(100, 900)
    strata = [stratified(timesteps, stratum, 4, 100, 899) for stratum in range(4)]
    assert [(int(one.min()), int(one.max())) for one in strata] == [(100, 299), (300, 499), (500, 699), (700, 899)]
    assert torch.equal(torch.cat(strata).bincount(minlength=900)[100:], torch.full((800,), 4))


def test_the_loss_equals_that_of_stock_diffusers_with_the_saved_file(tmp_path: Path):
    run = train_run(
        tmp_path, data={"validation_split": 0.2, "caption_dropout": 1.0}, network={"text_encoder_rank": 4},
        objective={"loss_weighting": "none", "min_timestep": 50}, optimization={"steps": 6},
        output=FOUR_OF_20["output"] | {"save_every": 0},
    )  # fmt: skip
    stock = StableDiffusionPipeline.from_pretrained(EMBEDDED)
    options = Options.model_validate({"data": {"images": str(SAMPLES), "validation_split": 0.2}})
    examples = [example for example in read_examples(options).examples if example.is_held_out]

    @torch.no_grad()
    def loss() -> float:
        total = 0.0
        for position, example in enumerate(examples):
            image = Image.open(example.image).convert("RGBA")
            white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            pixels = stock.image_processor.preprocess(white.resize((64, 64), Image.Resampling.LANCZOS))
            posterior = stock.vae.encode(pixels).latent_dist
            ids = stock.tokenizer(example.caption, padding="max_length", return_tensors="pt").input_ids
            hidden = stock.text_encoder(ids)[0]
            for draw in range(DRAWS):
                generator = generator_for(0, draw, position)
                posterior_noise, noise = torch.randn((2, *posterior.mean.shape[1:]), generator=generator)
                drawn = torch.randint(50, 1000, (), generator=generator)
                timestep = 50 + (drawn - 50 + draw * 950) // DRAWS
                latents = (posterior.mean + posterior.std * posterior_noise) * stock.vae.config["scaling_factor"]
                noisy = stock.scheduler.add_noise(latents, noise[None], timestep[None])
                prediction = stock.unet(noisy, timestep, hidden).sample
                total += float((prediction - noise).square().mean())
        return total / (DRAWS * len(examples))

    before, after = run.of("validation")
    assert before["loss"] == pytest.approx(loss(), rel=1e-4)
    stock.load_lora_weights(str(run.folder / "clay.safetensors"))
    assert after["loss"] == pytest.approx(loss(), rel=1e-4) and abs(after["loss"] / before["loss"] - 1) > 1e-3
    change = after["loss"] / before["loss"] - 1
    assert after["text"] == f"  validation, step 6: loss {after['loss']:.4f}, {change:+.1%} compared with the base"


def test_a_resumed_run_keeps_its_validation_losses_and_its_best_checkpoint(tmp_path: Path):
    tables: dict[str, Any] = {
        "data": {"validation_split": 0.2},
        # the learning rate is so high that the loss rises
        "optimization": {"steps": 8, "learning_rate": 0.1, "lr_warmup_steps": 0.0, "ema_decay": 0.5},
        "output": {
            "preview_every": 0,
            "save_every": 2,
            "keep_checkpoints": "best",
            "keep_count": 1,
            "save_precision": "fp32",
        },
    }
    unbroken = train_run(tmp_path / "a", **tables)
    losses = {event["step"]: event["loss"] for event in unbroken.of("validation")}
    assert list(losses) == [0, 2, 4, 6, 8]
    best = min((2, 4, 6), key=lambda step: losses[step])
    assert [path.name for path in (unbroken.folder / "checkpoints").iterdir()] == [f"clay-{best:06}.safetensors"]
    assert unbroken.events[-1]["text"].splitlines()[-1] == (
        f"validation: loss {losses[8]:.4f} after step 8; it was lowest after step 0 ({min(losses.values()):.4f}) "
        "and has risen on unseen images since"
    )
    stopped = interrupted_run(tmp_path / "b", stop_at=3, **tables)
    resumed = resume_run(stopped)
    assert [(event["step"], event["loss"]) for event in resumed.of("validation")] == [*losses.items()][2:]
    loaded = newest_state(stopped, pytest.fail)
    assert loaded and dict(loaded.state.validation_losses) == losses
    assert_same(adapter_of(stopped), adapter_of(unbroken.folder))
    with pytest.raises(Refused, match=r"--validation-split 0.5: the run uses 0.2, which cannot change within a run"):
        resume_run(stopped, data={"validation_split": 0.5}, optimization={"steps": 10})


def test_a_run_without_validation_losses_can_be_resumed(tmp_path: Path):
    stopped = interrupted_run(tmp_path, stop_at=2, output={"preview_every": 0})
    (numbers,) = (stopped / "state").glob("*/state.json")
    assert json.loads(numbers.read_text().splitlines()[0])["validation_losses"] == []
    assert resume_run(stopped).events[-1]["kind"] == "done"


def test_the_loss_curve_has_a_second_line_for_validation():
    losses = [0.1] * 50
    plain, both = loss_curve(losses, "clay"), loss_curve(losses, "clay", {0: 0.12, 25: 0.1, 50: 0.09})
    blue = (30, 100, 180)
    counts = [sum(count for count, color in image.getcolors(1 << 20) or () if color == blue) for image in (plain, both)]
    assert counts[0] == 0 and counts[1] > 500
