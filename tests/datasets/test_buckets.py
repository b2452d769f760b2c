"""Buckets and crops: valid sizes, well-placed crops, crop loss, and evenly weighted batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw
from runs import SAMPLES, train_run
from small_parts import CPU
from tiny import tiny_base

from scumble.configs.errors import Refused
from scumble.configs.options import Data, Model, Objective, Options
from scumble.datasets import focus
from scumble.datasets.batches import batch_sizes, describe_batches, split_evenly
from scumble.datasets.buckets import make_buckets, nearest_bucket
from scumble.datasets.crop_loss import bucket_uses, describe_crop_loss
from scumble.datasets.crops import crop_examples, stratified_shares, tables
from scumble.datasets.focus import best_share, focus_map, saliency
from scumble.datasets.reading.folder import read_set
from scumble.datasets.reading.images import Crop, Size, center_crop, crop_at, read_size
from scumble.trainer.adapters.targets import Part
from scumble.trainer.base_model.detect import detect_base
from scumble.trainer.base_model.latents import encode_set
from scumble.trainer.base_model.load import load
from scumble.trainer.training.flat_parameters import FlatParameters
from scumble.trainer.training.forward_backward import Passes
from scumble.trainer.training.lora import attach
from scumble.trainer.training.objective import Objectives, Sample
from scumble.trainer.training.optimizer_step import OptimizerStep
from scumble.trainer.training.optimizers import make_optimizer, param_groups

SHAPES = [
    (50, 300),
    (1, 5000),
    (5000, 1),
    (1, 1),
    (7, 9),
    (64, 64),
    (700, 500),
    (1920, 1080),
    (6000, 4000),
    (320, 2000),
]


def save_image(path: Path, size: tuple[int, int], color: str = "gray") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


@pytest.mark.parametrize("upscale", [True, False])
@pytest.mark.parametrize("limits", [(0, 0), (256, 0), (0, 640), (320, 768)])
@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 64), (1024, 32), (64, 16)])
def test_every_image_gets_a_valid_bucket(resolution: int, step: int, limits: tuple[int, int], upscale: bool):
    min_px, max_px = (0, 0) if resolution == 64 else limits
    buckets = make_buckets(resolution, step, min_px, max_px, upscale)
    for shape in SHAPES:
        size = buckets.bucket_of(Size(*shape))
        short, long = sorted((size.width, size.height))
        assert short % step == long % step == 0 and short >= max(step, min_px), (shape, size)
        assert long <= (max_px or resolution * 3**0.5 + step) and long <= 3 * short
        assert size.pixels <= resolution**2
        crop = crop_at(Size(*shape), size, 0.5)
        assert 0 <= crop.left <= crop.resized.width - size.width and 0 <= crop.top <= crop.resized.height - size.height


def test_without_upscaling_only_images_below_one_bucket_step_are_enlarged():
    buckets = make_buckets(512, 64, upscale=False)
    for shape in SHAPES:
        size, (width, height) = buckets.bucket_of(Size(*shape)), shape
        if min(shape) >= 64:
            assert size.width <= width and size.height <= height, (shape, size)
    assert buckets.bucket_of(Size(200, 150)) == Size(192, 128)
    assert buckets.bucket_of(Size(4000, 3000)) == make_buckets(512, 64).bucket_of(Size(4000, 3000))
    assert buckets.bucket_of(Size(50, 300)) == Size(64, 192)  # its short side must be enlarged to one step


def test_the_bucket_is_the_one_that_crops_least():
    sizes = make_buckets(512, 64).sizes
    for shape in SHAPES:
        cuts = [crop_at(Size(*shape), size, 0.5).cut for size in sizes]
        chosen = crop_at(Size(*shape), nearest_bucket(Size(*shape), sizes), 0.5).cut
        assert chosen <= min(cuts) + 0.01, shape  # sides are rounded to pixels


def test_sdxl_has_more_buckets_with_a_step_of_32_and_the_standard_ones_with_64():
    coarse, fine = make_buckets(1024, 64).sizes, make_buckets(1024, 32).sizes
    assert len(fine) > 1.8 * len(coarse)
    standard = {(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216), (1344, 768), (768, 1344), (1536, 640)}
    assert standard <= {(size.width, size.height) for size in coarse}  # Podell et al. 2023, appendix I


def test_limits_that_leave_no_bucket_are_refused_by_option():
    with pytest.raises(
        Refused, match="--min-bucket-reso 600: leaves no bucket for --resolution 512 with a bucket step of 64 px"
    ):
        make_buckets(512, 64, min_px=600)
    with pytest.raises(Refused, match="--max-bucket-reso 32: leaves no bucket"):
        make_buckets(512, 64, max_px=32)
    with pytest.raises(Refused, match="--resolution 64: must be at least the bucket step of 128 px"):
        make_buckets(64, 128)


def test_a_bucket_step_that_the_base_cannot_downsample_is_refused(tmp_path: Path):
    data = {"bucket_reso_steps": 40, "resolution": 64}
    with pytest.raises(Refused, match="--bucket-reso-steps 40: must be a multiple of 16 for Stable Diffusion XL"):
        train_run(tmp_path, dry_run=True, model={"base": str(tiny_base("sdxl", tmp_path / "sdxl"))}, data=data)


def test_random_crops_are_drawn_once_and_cover_the_whole_image(tmp_path: Path):
    save_image(tmp_path / "wide.png", (400, 100))
    data = Data(crop="random", crops=4, random_flip=True)
    (cropped,) = crop_examples(read_set(tmp_path).examples, tables(data, 64, 16), data, seed=3)
    (again,) = crop_examples(read_set(tmp_path).examples, tables(data, 64, 16), data, seed=3)
    (other,) = crop_examples(read_set(tmp_path).examples, tables(data, 64, 16), data, seed=4)
    assert cropped == again != other and len(cropped.crops) == 8 and len({crop.target for crop in cropped.crops}) == 1
    slack = cropped.crops[0].resized.width - cropped.size.width
    quarters = sorted({crop.left * 4 // (slack + 1) for crop in cropped.crops})
    assert slack > 20 and quarters == [0, 1, 2, 3]
    assert all(part / 7 <= share < (part + 1) / 7 for part, share in enumerate(stratified_shares(7, "x")))


def test_an_image_that_fits_its_bucket_has_one_crop_regardless_of_the_requested_number(tmp_path: Path):
    save_image(tmp_path / "square.png", (100, 100))
    data = Data(crop="random", crops=8)
    (cropped,) = crop_examples(read_set(tmp_path).examples, tables(data, 64, 16), data, seed=0)
    assert len(cropped.crops) == 1 and cropped.crops[0].cut == 0


def test_each_resolution_adds_a_crop_of_an_image_unless_its_size_is_the_same(tmp_path: Path):
    save_image(tmp_path / "large.png", (512, 512))
    save_image(tmp_path / "small.png", (70, 70))
    data = Data(more_resolutions=(128, 256), bucket_upscale=False)
    cropped = crop_examples(read_set(tmp_path).examples, tables(data, 64, 16), data, seed=0)
    assert [(one.example.image.name, str(one.size)) for one in cropped] == [
        ("large.png", "64x64"), ("large.png", "128x128"), ("large.png", "256x256"), ("small.png", "64x64")
    ]  # fmt: skip


def ball_at(left: int) -> Image.Image:
    """Draw a striped ball on a soft gradient."""
    gradient = np.tile(np.linspace(120, 150, 400).astype(np.uint8), (100, 1))
    image = Image.fromarray(gradient).convert("RGB")
    pen = ImageDraw.Draw(image)
    for ring, color in ((40, "white"), (30, "black"), (20, "red"), (10, "yellow")):
        pen.ellipse((left - ring, 50 - ring, left + ring, 50 + ring), fill=color)
    return image


@pytest.mark.parametrize("left", [60, 150, 200, 330])
def test_a_salient_object_is_inside_the_crop(left: int, tmp_path: Path):
    ball_at(left).save(tmp_path / "ball.png")
    data = Data(crop="focus")
    (cropped,) = crop_examples(read_set(tmp_path).examples, tables(data, 64, 16), data, seed=0)
    (crop,) = cropped.crops
    scale = crop.resized.width / 400
    assert crop.left <= (left - 30) * scale and (left + 30) * scale <= crop.left + crop.target.width
    row, column = np.unravel_index(saliency(ball_at(left)).argmax(), (64, 64))
    assert abs(column / 64 * 400 - left) <= 45 and abs(row / 64 * 100 - 50) <= 45


def test_without_a_salient_object_the_crop_is_centered(tmp_path: Path):
    save_image(tmp_path / "flat.png", (400, 100))
    assert best_share(focus_map(tmp_path / "flat.png", None, False), Size(400, 100), Size(64, 64)) == 0.5
    assert best_share(np.ones((4, 16)), Size(400, 100), Size(64, 64)) == 0.5
    assert best_share(np.eye(8), Size(100, 100), Size(64, 64)) == 0.5


def test_the_best_crop_position_equals_that_of_an_exhaustive_search(tmp_path: Path):
    rng = np.random.default_rng(0)
    for _ in range(20):
        weights = rng.random((10, 40)) ** 8
        share = best_share(weights, Size(400, 100), Size(64, 64))
        line = weights.sum(0)
        kept = [line[start : start + 10].sum() for start in range(31)]
        at = share * 30
        low, part = int(at), at - int(at)
        found = kept[low] * (1 - part) + kept[min(low + 1, 30)] * part
        assert found >= max(kept) - 0.03 * line.sum()


def face(size: int) -> Image.Image:
    """Draw a simple face, which a Haar cascade detects."""
    image = Image.new("L", (size, size), 200)
    pen = ImageDraw.Draw(image)

    def oval(x: float, y: float, half_width: float, half_height: float, gray: int) -> None:
        pen.ellipse(
            ((x - half_width) * size, (y - half_height) * size, (x + half_width) * size, (y + half_height) * size),
            fill=gray,
        )

    oval(0.5, 0.5, 0.36, 0.46, 170)
    for eye in (0.35, 0.65):
        oval(eye, 0.40, 0.10, 0.05, 90)
        oval(eye, 0.41, 0.045, 0.045, 30)
        pen.line(((eye - 0.12) * size, 0.3 * size, (eye + 0.12) * size, 0.3 * size), fill=60, width=size // 25)
    pen.polygon([(0.5 * size, 0.42 * size), (0.43 * size, 0.62 * size), (0.57 * size, 0.62 * size)], fill=150)
    oval(0.5, 0.62, 0.07, 0.02, 100)
    oval(0.5, 0.75, 0.16, 0.04, 80)
    return image


def test_a_face_takes_precedence_over_a_more_salient_object(tmp_path: Path):
    image = ball_at(60).resize((1600, 400))
    image.paste(face(300).convert("RGB"), (1200, 50))
    image.save(tmp_path / "both.png")
    found = focus_map(tmp_path / "both.png", None, True)
    rows, columns = np.unravel_index(found.argmax(), found.shape)
    assert 0.75 < columns / found.shape[1] < 0.94 and 0.2 < rows / found.shape[0] < 0.8
    assert best_share(found, Size(1600, 400), Size(64, 64)) > 0.85
    assert best_share(focus_map(tmp_path / "both.png", None, False), Size(1600, 400), Size(64, 64)) < 0.4


def test_without_opencv_crop_faces_is_refused_with_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_image(tmp_path / "a.png", (90, 60))
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    focus._cascade.cache_clear()
    with pytest.raises(Refused, match=r"--crop faces needs OpenCV: pip install 'scumble\[faces\]'"):
        focus_map(tmp_path / "a.png", None, True)


def test_a_focus_crop_keeps_the_unmasked_area(tmp_path: Path):
    ball_at(60).save(tmp_path / "ball.png")
    shown = Image.new("L", (400, 100), 0)
    shown.paste(255, (320, 0, 390, 100))
    shown.save(tmp_path / "ball-masklabel.png")
    data = Data(crop="focus")
    (cropped,) = crop_examples(read_set(tmp_path).examples, tables(data, 64, 16), data, seed=0)
    (crop,) = cropped.crops
    scale = crop.resized.width / 400
    assert crop.left <= 320 * scale and 390 * scale <= crop.left + crop.target.width + 1


def test_crop_loss_is_reported_per_bucket_with_the_worst_image(tmp_path: Path):
    save_image(tmp_path / "square.png", (128, 128))
    save_image(tmp_path / "strip.png", (800, 80))
    data = Data()
    cropped = crop_examples(read_set(tmp_path, repeats=3).examples, tables(data, 64, 16), data, seed=0)
    uses = {f"{use.width}x{use.height}": use for use in bucket_uses(cropped)}
    assert uses["64x64"].cut == 0 and uses["64x64"].samples == 3 and uses["64x64"].enlarged == 0
    assert uses["96x32"].cut == pytest.approx(1 - 3 / 10, abs=0.01)
    line = describe_crop_loss(cropped)
    assert "96x32 (1)" in line and "most in strip.png (70%)" in line and "removes 35%" in line
    square = [one for one in cropped if one.example.image.name == "square.png"]
    assert describe_crop_loss(square) == ""


def test_uneven_buckets_are_split_into_batches_of_similar_size_and_reported():
    assert [split_evenly(count, 4) for count in (1, 4, 5, 9, 11)] == [[1], [4], [3, 2], [3, 3, 3], [4, 4, 3]]
    for count in range(1, 60):
        for batch in range(1, 12):
            sizes = split_evenly(count, batch)
            assert sum(sizes) == count and len(sizes) == -(-count // batch) and max(sizes) - min(sizes) <= 1
    buckets, repeats = ["square"] * 9 + ["wide"], [1] * 10
    assert batch_sizes(buckets, repeats, 4) == {3: 3, 1: 1}
    assert (
        "3 of size 3, 1 of size 1" in describe_batches(buckets, repeats, 4)
        and describe_batches(["a"] * 8, [1] * 8, 4) == ""
    )


def test_a_crop_of_a_single_pixel_is_the_whole_image():
    assert crop_at(Size(1, 1), Size(64, 64), 0.3) == Crop(Size(1, 1), Size(64, 64), 0, 0, Size(64, 64))


def test_a_sample_has_the_same_weight_in_a_small_batch_as_in_a_full_one():
    base = load(Model(), detect_base(Model()), CPU, torch.float32)
    examples = read_set(SAMPLES).examples[:3]
    crops = [[center_crop(read_size(example.image), Size(64, 64))] for example in examples]
    latents = encode_set(base, [(e.image, c) for e, c in zip(examples, crops, strict=True)])
    trained = attach(base, Options().network, [Part("unet", 4, 4.0)], seed=0)
    named = {f"{module.key}.{slot}": tensor for module in trained for slot, tensor in module.tensors.items()}
    objectives = Objectives(base, examples, crops, latents, Data(caption_dropout=0.0), Objective(), 0, False)
    flat = FlatParameters([list(named.values())])
    optimizer = make_optimizer("adamw", param_groups([(1e-3, list(named.values()))]), 0.0, flat)
    passes = Passes(objectives, flat)
    update = OptimizerStep(Accelerator(cpu=True), passes, named, flat, optimizer, 1.0, 0.0, samples_per_step=2)

    def gradients(batch: list[int]) -> torch.Tensor:
        update.gradients(7, [batch])
        found = flat.gradients[0].clone()
        flat.zero_grad()
        return found

    objectives.losses([Sample(2, 7, 2)]).sum().backward()  # the third sample alone
    third = flat.gradients[0].clone()
    flat.zero_grad()
    torch.testing.assert_close(gradients([0, 1, 2]) - gradients([0, 1]), third / 2, rtol=1e-3, atol=1e-6)
    assert float(update.gradients(7, [[0]])) == pytest.approx(float(objectives.losses([Sample(0, 7, 0)])), rel=1e-5)
