"""Masks: finding them, cropping them like their images, and weighting the loss with them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from odd_pictures import plain
from PIL import Image
from runs import SAMPLES, train_run
from small_parts import CPU

from scumble.configs.errors import Refused
from scumble.configs.options import Data, Model, Objective
from scumble.datasets.crops import crop_examples, tables
from scumble.datasets.reading.folder import Masks, read_set
from scumble.datasets.reading.images import Size, center_crop, crop_at, read_size
from scumble.datasets.reading.masks import read_mask
from scumble.datasets.tensors import cropped_masks, mask_weights, masks_of
from scumble.trainer.base_model.detect import detect_base
from scumble.trainer.base_model.latents import encode_set
from scumble.trainer.base_model.load import load
from scumble.trainer.training.objective import Objectives, Sample, generator_for


def halves(size: tuple[int, int] = (40, 28)) -> Image.Image:
    """Return a mask that is white on the left and black on the right."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def test_masks_are_found_in_a_folder_by_suffix_and_in_the_alpha_channel(tmp_path: Path):
    for name in "abcd":
        plain().save(tmp_path / f"{name}.png")
    (tmp_path / "masks").mkdir()
    halves().save(tmp_path / "masks/a.jpg")
    halves().save(tmp_path / "masks/stray.png")
    halves().save(tmp_path / "b-masklabel.PNG")
    clear = plain().convert("RGBA")
    clear.putalpha(halves())
    clear.save(tmp_path / "c.png")

    def masks(mode: Masks) -> dict[str, str]:
        examples = read_set(tmp_path, masks=mode).examples
        return {example.image.name: example.mask.name for example in examples if example.mask}

    assert masks("auto") == {"a.png": "a.jpg", "b.png": "b-masklabel.PNG"}
    assert masks("alpha") == {"a.png": "a.jpg", "b.png": "b-masklabel.PNG", "c.png": "c.png"}
    assert masks("off") == {}
    assert [str(one) for one in read_set(tmp_path).left_out] == [
        f"{tmp_path}/masks/stray.png: mask without a matching image"
    ]


def test_a_folder_named_masks_without_images_next_to_it_contains_training_images(tmp_path: Path):
    (tmp_path / "masks").mkdir()
    plain().save(tmp_path / "masks/carnival.png")
    assert [example.image.name for example in read_set(tmp_path).examples] == ["carnival.png"]


def test_a_list_of_folders_can_set_a_folder_of_masks_or_alpha(tmp_path: Path):
    (tmp_path / "photos/inner").mkdir(parents=True)
    (tmp_path / "shown/inner").mkdir(parents=True)
    for name in ("a.png", "inner/b.png"):
        plain().save(tmp_path / "photos" / name)
        halves().save(tmp_path / "shown" / name)
    (tmp_path / "set.toml").write_text("[[folders]]\npath = 'photos'\nmasks = 'shown'\n")
    found = read_set(tmp_path / "set.toml").examples
    assert [example.mask for example in found] == [tmp_path / "shown/a.png", tmp_path / "shown/inner/b.png"]
    clear = plain().convert("RGBA")
    clear.putalpha(halves())
    clear.save(tmp_path / "photos/a.png")
    (tmp_path / "set.toml").write_text("[[folders]]\npath = 'photos'\nmasks = 'alpha'\n")
    assert [example.mask for example in read_set(tmp_path / "set.toml").examples] == [tmp_path / "photos/a.png", None]


def test_images_with_unusable_masks_are_left_out_with_the_reason(tmp_path: Path):
    for name in ("black", "shape", "broken", "clear", "good"):
        plain().save(tmp_path / f"{name}.png")
    Image.new("L", (40, 28), 0).save(tmp_path / "black-masklabel.png")
    Image.new("L", (40, 40), 255).save(tmp_path / "shape-masklabel.png")
    halves((40, 40)).save(tmp_path / "shape-masklabel.png")
    (tmp_path / "broken-masklabel.png").write_bytes(b"no")
    plain().convert("RGBA").save(tmp_path / "clear.png")
    with Image.open(tmp_path / "clear.png") as opened:
        opened.putalpha(0)
        opened.save(tmp_path / "clear.png")
    found = read_set(tmp_path, masks="alpha")
    reasons = {one.path.name: one.reason for one in found.left_out}
    assert [example.image.name for example in found.examples] == ["good.png"]
    assert "black-masklabel.png: is fully black" in reasons["black.png"]
    assert "is 40x40, but the image is 40x28; draw the mask with the aspect ratio of the image" in reasons["shape.png"]
    assert "broken-masklabel.png: cannot be read as an image" in reasons["broken.png"]
    assert reasons["clear.png"].startswith("is fully transparent, so no part of the image would count")


def test_transparent_areas_of_a_mask_are_black_and_its_icc_profile_is_ignored(tmp_path: Path):
    from icc import gray_gamma

    plain().save(tmp_path / "a.png")
    drawn = Image.new("RGBA", (40, 28), (255, 255, 255, 0))
    drawn.paste((255, 255, 255, 255), (0, 0, 20, 28))
    drawn.save(tmp_path / "a-masklabel.png")
    mask = read_mask(tmp_path / "a.png", tmp_path / "a-masklabel.png")
    assert mask and np.array_equal(np.asarray(mask), np.asarray(halves()))
    Image.new("L", (40, 28), 100).save(tmp_path / "gray.png", icc_profile=gray_gamma(1.0))
    mask = read_mask(tmp_path / "a.png", tmp_path / "gray.png")
    assert mask and mask.getextrema() == (100, 100)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_mask_is_cropped_like_its_image_and_averaged_to_latent_resolution(mirrored: bool, tmp_path: Path):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (64, 128), dtype=np.uint8)
    Image.fromarray(values).convert("RGB").save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "mask.png")
    crop = crop_at(Size(128, 64), Size(64, 64), 0.25, mirrored)
    (mask,) = cropped_masks(tmp_path / "a.png", tmp_path / "mask.png", [crop], Size(8, 8))
    blocks = values[:, 16:80].reshape(8, 8, 8, 8).mean((1, 3))
    assert mask.dtype == torch.uint8
    np.testing.assert_allclose(mask, blocks[:, ::-1] if mirrored else blocks, atol=1)


def test_mask_weights_have_mean_one_and_black_areas_weigh_the_floor():
    mask = torch.tensor([[250, 125], [0, 0]], dtype=torch.uint8)
    torch.testing.assert_close(mask_weights(mask), torch.tensor([[8 / 3, 4 / 3], [0.0, 0.0]]))
    mask[0] = torch.tensor([255, 125])
    weights = mask_weights(mask, floor=0.1)
    assert float(weights.mean()) == pytest.approx(1) and float(weights[1, 0] / weights[0, 0]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="fully black"):
        mask_weights(torch.zeros(2, 2, dtype=torch.uint8))


def test_a_mask_that_is_black_inside_the_crop_is_refused_before_anything_is_loaded(tmp_path: Path):
    Image.new("RGB", (256, 64), "red").save(tmp_path / "wide.png")
    mask = Image.new("L", (256, 64), 0)
    mask.paste(255, (0, 0, 12, 64))
    mask.save(tmp_path / "wide-masklabel.png")
    data = {"images": str(tmp_path), "max_bucket_reso": 64}
    with pytest.raises(Refused, match=r"wide\.png: its mask is black inside the crop; .*--crop focus"):
        train_run(tmp_path / "runs", dry_run=True, data=data)
    train_run(tmp_path / "runs", dry_run=True, data=data | {"crop": "focus"})
    train_run(tmp_path / "runs", dry_run=True, data=data | {"masks": "off"})


def test_a_masked_loss_is_the_plain_loss_over_the_unmasked_area():
    base = load(Model(), detect_base(Model()), CPU, torch.float32)
    examples = read_set(SAMPLES).examples[:2]
    crops = [[center_crop(read_size(example.image), Size(64, 64))] for example in examples]
    latents = encode_set(base, [(e.image, c) for e, c in zip(examples, crops, strict=True)])
    half = torch.zeros(16, 16, dtype=torch.uint8)
    half[:, :5] = 255
    masks: list[tuple[torch.Tensor, ...]] = [(half,), ()]  # the second image has no mask
    samples = [Sample(0, 3, 0), Sample(1, 3, 1)]

    def losses(masks: list[tuple[torch.Tensor, ...]], floor: float = 0.0) -> torch.Tensor:
        data = Data(caption_dropout=0.0, mask_floor=floor)
        objectives = Objectives(
            base,
            examples,
            crops,
            latents,
            data,
            Objective(loss_weighting="none"),
            5,
            text_is_trained=False,
            masks=masks,
        )
        with torch.no_grad():
            return objectives.losses(samples)

    generator = generator_for(5, 3, 0)
    posterior, noise = torch.randn(2, 4, 16, 16, generator=generator)
    timestep = torch.randint(0, 1000, (1,), generator=generator)
    clean = (latents.mean[0][0] + latents.std[0][0] * posterior) * base.vae.config["scaling_factor"]
    ids = base.tokenizers[0](examples[0].caption, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        noisy = base.pipeline.scheduler.add_noise(clean[None], noise[None], timestep)
        prediction = base.unet(noisy, timestep, base.text_encoders[0](ids)[0]).sample
    distances = (prediction[0] - noise) ** 2
    expected = distances[:, :, :5].mean()
    columns = torch.tensor([1.0] * 5 + [0.25] * 11)
    torch.testing.assert_close(
        losses(masks, 0.25)[0], (distances * columns / columns.mean()).mean(), rtol=1e-4, atol=1e-6
    )
    masked, plain_loss = losses(masks), losses([(), ()])
    torch.testing.assert_close(masked[0], expected, rtol=1e-4, atol=1e-6)
    assert float(masked[1]) == pytest.approx(float(plain_loss[1]), rel=1e-5) and masked[0] != plain_loss[0]


def test_masks_in_a_folder_change_the_training_loss(tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("fox", "panda"):
        data = (SAMPLES / f"{name}.webp").read_bytes()
        (folder / f"{name}.webp").write_bytes(data)
    size = read_size(folder / "fox.webp")
    halves((size.width, size.height)).save(folder / "fox-masklabel.png")

    def losses(masks: str) -> list[float]:
        data = {"images": str(folder), "masks": masks}
        return train_run(tmp_path / masks, data=data, optimization={"steps": 2}, output={"preview_every": 0}).losses

    assert losses("auto") != losses("off") and all(loss > 0 for loss in losses("alpha"))


def test_an_image_without_a_mask_has_no_latent_masks(tmp_path: Path):
    plain().save(tmp_path / "a.png")
    (cropped_example,) = crop_examples(read_set(tmp_path).examples, tables(Data(), 64, 16), Data(), 0)
    assert masks_of(cropped_example, 4, 0.0) == ()
