"""Which part of a picture training sees: buckets that can be, crops where they should be, and what they cost."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw
from runs import SAMPLES, ran
from small_parts import CPU
from tiny import tiny_base

from scumble.configs.errors import Refused
from scumble.configs.options import Data, Model, Objective, Options
from scumble.datasets import focus
from scumble.datasets.batches import batch_sizes, describe_batches, even
from scumble.datasets.buckets import make_buckets, nearest_bucket
from scumble.datasets.crop_loss import bucket_uses, describe_crop_loss
from scumble.datasets.crops import crop_examples, spread, tables
from scumble.datasets.focus import best_share, focus_map, saliency
from scumble.datasets.reading.folder import read_set
from scumble.datasets.reading.images import Crop, Size, center_crop, crop_at, read_size
from scumble.trainer.adapters.targets import Part
from scumble.trainer.base_model.detect import detect_base
from scumble.trainer.base_model.latents import encode_set
from scumble.trainer.base_model.load import load
from scumble.trainer.training.flat_parameters import Flat
from scumble.trainer.training.forward_backward import Passes
from scumble.trainer.training.lora import attach
from scumble.trainer.training.objective import Objectives, Sample
from scumble.trainer.training.optimizer_step import Update
from scumble.trainer.training.optimizers import grouped, make_optimizer

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


def saved(path: Path, size: tuple[int, int], colour: str = "grey") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.mark.parametrize("upscale", [True, False])
@pytest.mark.parametrize("limits", [(0, 0), (256, 0), (0, 640), (320, 768)])
@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 64), (1024, 32), (64, 16)])
def test_no_picture_gets_a_bucket_that_cannot_be(resolution: int, step: int, limits: tuple[int, int], upscale: bool):
    least, most = (0, 0) if resolution == 64 else limits
    buckets = make_buckets(resolution, step, least, most, upscale)
    for shape in SHAPES:
        size = buckets.of(Size(*shape))
        short, long = sorted((size.width, size.height))
        assert short % step == long % step == 0 and short >= max(step, least), (shape, size)
        assert long <= (most or resolution * 3**0.5 + step) and long <= 3 * short
        assert size.pixels <= resolution**2
        crop = crop_at(Size(*shape), size, 0.5)
        assert 0 <= crop.left <= crop.resized.width - size.width and 0 <= crop.top <= crop.resized.height - size.height


def test_pictures_are_not_enlarged_unless_a_single_step_is_too_much_for_them():
    buckets = make_buckets(512, 64, upscale=False)
    for shape in SHAPES:
        size, (width, height) = buckets.of(Size(*shape)), shape
        if min(shape) >= 64:
            assert size.width <= width and size.height <= height, (shape, size)
    assert buckets.of(Size(200, 150)) == Size(192, 128)
    assert buckets.of(Size(4000, 3000)) == make_buckets(512, 64).of(Size(4000, 3000))
    assert buckets.of(Size(50, 300)) == Size(64, 192)  # its short side must grow to one step


def test_the_bucket_is_the_one_that_cuts_least():
    sizes = make_buckets(512, 64).sizes
    for shape in SHAPES:
        cuts = [crop_at(Size(*shape), size, 0.5).cut for size in sizes]
        own = crop_at(Size(*shape), nearest_bucket(Size(*shape), sizes), 0.5).cut
        assert own <= min(cuts) + 0.01, shape  # sides are rounded to pixels


def test_sdxl_gets_more_shapes_with_a_step_of_32_and_the_usual_ones_with_64():
    coarse, fine = make_buckets(1024, 64).sizes, make_buckets(1024, 32).sizes
    assert len(fine) > 1.8 * len(coarse)
    usual = {(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216), (1344, 768), (768, 1344), (1536, 640)}
    assert usual <= {(size.width, size.height) for size in coarse}  # Podell et al. 2023, appendix I


def test_limits_that_leave_nothing_are_refused_by_option():
    with pytest.raises(Refused, match="--min-bucket-reso 600: leaves no size for --resolution 512 in steps of 64 px"):
        make_buckets(512, 64, least_px=600)
    with pytest.raises(Refused, match="--max-bucket-reso 32: leaves no size"):
        make_buckets(512, 64, most_px=32)
    with pytest.raises(Refused, match="--resolution 64: sides are in steps of 128"):
        make_buckets(64, 128)


def test_a_step_that_the_base_cannot_halve_is_refused(tmp_path: Path):
    data = {"bucket_reso_steps": 40, "resolution": 64}
    with pytest.raises(Refused, match="--bucket-reso-steps 40: must be a multiple of 16 for Stable Diffusion XL"):
        ran(tmp_path, dry_run=True, model={"base": str(tiny_base("sdxl", tmp_path / "sdxl"))}, data=data)


def test_random_crops_are_few_known_ones_that_reach_over_the_whole_picture(tmp_path: Path):
    saved(tmp_path / "wide.png", (400, 100))
    data = Data(crop="random", crops=4, random_flip=True)
    (view,) = crop_examples(read_set(tmp_path).examples, tables(data, 64, 16), data, seed=3)
    (again,) = crop_examples(read_set(tmp_path).examples, tables(data, 64, 16), data, seed=3)
    (other,) = crop_examples(read_set(tmp_path).examples, tables(data, 64, 16), data, seed=4)
    assert view == again != other and len(view.crops) == 8 and len({crop.target for crop in view.crops}) == 1
    slack = view.crops[0].resized.width - view.size.width
    quarters = sorted({crop.left * 4 // (slack + 1) for crop in view.crops})
    assert slack > 20 and quarters == [0, 1, 2, 3]
    assert all(part / 7 <= share < (part + 1) / 7 for part, share in enumerate(spread(7, "x")))


def test_a_picture_that_fits_its_bucket_has_one_crop_however_many_are_asked_for(tmp_path: Path):
    saved(tmp_path / "square.png", (100, 100))
    data = Data(crop="random", crops=8)
    (view,) = crop_examples(read_set(tmp_path).examples, tables(data, 64, 16), data, seed=0)
    assert len(view.crops) == 1 and view.crops[0].cut == 0


def test_each_resolution_shows_a_picture_once_more_unless_it_is_the_same_size(tmp_path: Path):
    saved(tmp_path / "large.png", (512, 512))
    saved(tmp_path / "small.png", (70, 70))
    data = Data(more_resolutions=(128, 256), bucket_upscale=False)
    views = crop_examples(read_set(tmp_path).examples, tables(data, 64, 16), data, seed=0)
    assert [(view.example.image.name, str(view.size)) for view in views] == [
        ("large.png", "64x64"), ("large.png", "128x128"), ("large.png", "256x256"), ("small.png", "64x64")
    ]  # fmt: skip


def thing_at(left: int) -> Image.Image:
    """A striped ball on a soft slope."""
    slope = np.tile(np.linspace(120, 150, 400).astype(np.uint8), (100, 1))
    picture = Image.fromarray(slope).convert("RGB")
    pen = ImageDraw.Draw(picture)
    for ring, colour in ((40, "white"), (30, "black"), (20, "red"), (10, "yellow")):
        pen.ellipse((left - ring, 50 - ring, left + ring, 50 + ring), fill=colour)
    return picture


@pytest.mark.parametrize("left", [60, 150, 200, 330])
def test_what_stands_out_is_in_the_crop(left: int, tmp_path: Path):
    thing_at(left).save(tmp_path / "ball.png")
    data = Data(crop="focus")
    (view,) = crop_examples(read_set(tmp_path).examples, tables(data, 64, 16), data, seed=0)
    (crop,) = view.crops
    scale = crop.resized.width / 400
    assert crop.left <= (left - 30) * scale and (left + 30) * scale <= crop.left + crop.target.width
    heights, widths = np.unravel_index(saliency(thing_at(left)).argmax(), (64, 64))
    assert abs(widths / 64 * 400 - left) <= 45 and abs(heights / 64 * 100 - 50) <= 45


def test_nothing_that_stands_out_leaves_the_middle(tmp_path: Path):
    saved(tmp_path / "flat.png", (400, 100))
    assert best_share(focus_map(tmp_path / "flat.png", None, False), Size(400, 100), Size(64, 64)) == 0.5
    assert best_share(np.ones((4, 16)), Size(400, 100), Size(64, 64)) == 0.5
    assert best_share(np.eye(8), Size(100, 100), Size(64, 64)) == 0.5


def test_the_best_place_is_that_of_a_search_over_all(tmp_path: Path):
    draw = np.random.default_rng(0)
    for _ in range(20):
        weights = draw.random((10, 40)) ** 8
        share = best_share(weights, Size(400, 100), Size(64, 64))
        line = weights.sum(0)
        kept = [line[start : start + 10].sum() for start in range(31)]
        at = share * 30
        low, part = int(at), at - int(at)
        mine = kept[low] * (1 - part) + kept[min(low + 1, 30)] * part
        assert mine >= max(kept) - 0.03 * line.sum()


def face(size: int) -> Image.Image:
    """A face as a child draws it, which is one to a Haar cascade too."""
    picture = Image.new("L", (size, size), 200)
    pen = ImageDraw.Draw(picture)

    def oval(x: float, y: float, across: float, down: float, grey: int) -> None:
        pen.ellipse(((x - across) * size, (y - down) * size, (x + across) * size, (y + down) * size), fill=grey)

    oval(0.5, 0.5, 0.36, 0.46, 170)
    for eye in (0.35, 0.65):
        oval(eye, 0.40, 0.10, 0.05, 90)
        oval(eye, 0.41, 0.045, 0.045, 30)
        pen.line(((eye - 0.12) * size, 0.3 * size, (eye + 0.12) * size, 0.3 * size), fill=60, width=size // 25)
    pen.polygon([(0.5 * size, 0.42 * size), (0.43 * size, 0.62 * size), (0.57 * size, 0.62 * size)], fill=150)
    oval(0.5, 0.62, 0.07, 0.02, 100)
    oval(0.5, 0.75, 0.16, 0.04, 80)
    return picture


def test_a_face_is_kept_rather_than_what_stands_out_more(tmp_path: Path):
    picture = thing_at(60).resize((1600, 400))
    picture.paste(face(300).convert("RGB"), (1200, 50))
    picture.save(tmp_path / "both.png")
    found = focus_map(tmp_path / "both.png", None, True)
    rows, columns = np.unravel_index(found.argmax(), found.shape)
    assert 0.75 < columns / found.shape[1] < 0.94 and 0.2 < rows / found.shape[0] < 0.8
    assert best_share(found, Size(1600, 400), Size(64, 64)) > 0.85
    assert best_share(focus_map(tmp_path / "both.png", None, False), Size(1600, 400), Size(64, 64)) < 0.4


def test_without_opencv_faces_are_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saved(tmp_path / "a.png", (90, 60))
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    focus._cascade.cache_clear()
    with pytest.raises(Refused, match=r"--crop faces needs OpenCV: pip install 'scumble\[faces\]'"):
        focus_map(tmp_path / "a.png", None, True)


def test_a_crop_with_focus_keeps_what_the_mask_shows(tmp_path: Path):
    thing_at(60).save(tmp_path / "ball.png")
    shown = Image.new("L", (400, 100), 0)
    shown.paste(255, (320, 0, 390, 100))
    shown.save(tmp_path / "ball-masklabel.png")
    data = Data(crop="focus")
    (view,) = crop_examples(read_set(tmp_path).examples, tables(data, 64, 16), data, seed=0)
    (crop,) = view.crops
    scale = crop.resized.width / 400
    assert crop.left <= 320 * scale and 390 * scale <= crop.left + crop.target.width + 1


def test_waste_is_told_for_each_bucket_and_the_worst_picture_by_name(tmp_path: Path):
    saved(tmp_path / "square.png", (128, 128))
    saved(tmp_path / "strip.png", (800, 80))
    data = Data()
    views = crop_examples(read_set(tmp_path, repeats=3).examples, tables(data, 64, 16), data, seed=0)
    uses = {f"{use.width}x{use.height}": use for use in bucket_uses(views)}
    assert uses["64x64"].cut == 0 and uses["64x64"].samples == 3 and uses["64x64"].enlarged == 0
    assert uses["96x32"].cut == pytest.approx(1 - 3 / 10, abs=0.01)
    told = describe_crop_loss(views)
    assert "96x32 (1)" in told and "most of strip.png: 70%" in told and "leaves out 35%" in told
    square = [view for view in views if view.example.image.name == "square.png"]
    assert describe_crop_loss(square) == ""


def test_batches_that_do_not_come_out_even_are_made_alike_and_told():
    assert [even(count, 4) for count in (1, 4, 5, 9, 11)] == [[1], [4], [3, 2], [3, 3, 3], [4, 4, 3]]
    for count in range(1, 60):
        for batch in range(1, 12):
            sizes = even(count, batch)
            assert sum(sizes) == count and len(sizes) == -(-count // batch) and max(sizes) - min(sizes) <= 1
    buckets, repeats = ["square"] * 9 + ["wide"], [1] * 10
    assert batch_sizes(buckets, repeats, 4) == {3: 3, 1: 1}
    assert "3 of 3, 1 of 1" in describe_batches(buckets, repeats, 4) and describe_batches(["a"] * 8, [1] * 8, 4) == ""


def test_a_crop_of_a_dot_is_whole():
    assert crop_at(Size(1, 1), Size(64, 64), 0.3) == Crop(Size(1, 1), Size(64, 64), 0, 0, Size(64, 64))


def test_a_look_pulls_as_hard_in_a_small_batch_as_in_a_full_one():
    base = load(Model(), detect_base(Model()), CPU, torch.float32)
    examples = read_set(SAMPLES).examples[:3]
    crops = [[center_crop(read_size(example.image), Size(64, 64))] for example in examples]
    latents = encode_set(base, [(e.image, c) for e, c in zip(examples, crops, strict=True)])
    trained = attach(base, Options().network, [Part("unet", 4, 4.0)], seed=0)
    named = {f"{module.key}.{slot}": tensor for module in trained for slot, tensor in module.tensors.items()}
    objectives = Objectives(base, examples, crops, latents, Data(caption_dropout=0.0), Objective(), 0, False)
    flat = Flat([list(named.values())])
    optimizer = make_optimizer("adamw", grouped([(1e-3, list(named.values()))]), 0.0, flat)
    passes = Passes(objectives, flat)
    update = Update(Accelerator(cpu=True), passes, named, flat, optimizer, 1.0, 0.0, looks_per_step=2)

    def gradients(batch: list[int]) -> torch.Tensor:
        update.gradients(7, [batch])
        found = flat.gradients[0].clone()
        flat.zero_grad()
        return found

    objectives.losses([Sample(2, 7, 2)]).sum().backward()  # the third look by itself
    third = flat.gradients[0].clone()
    flat.zero_grad()
    torch.testing.assert_close(gradients([0, 1, 2]) - gradients([0, 1]), third / 2, rtol=1e-3, atol=1e-6)
    assert float(update.gradients(7, [[0]])) == pytest.approx(float(objectives.losses([Sample(0, 7, 0)])), rel=1e-5)
