"""From a folder to batches: captions, repeats, upright images, buckets and the order of an epoch."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scumble.configs.errors import Refused
from scumble.configs.options import Captions
from scumble.datasets.batches import batches_per_epoch, epoch_batches
from scumble.datasets.buckets import bucket_sizes, nearest_bucket
from scumble.datasets.captions import caption_at_step, with_trigger
from scumble.datasets.reading.folder import read_set
from scumble.datasets.reading.images import Size, center_crop, read_rgb, read_size
from scumble.datasets.tensors import cropped


def save_image(path: Path, size: tuple[int, int] = (64, 48), color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def test_images_are_sorted_and_have_the_caption_next_to_them(tmp_path: Path):
    save_image(tmp_path / "b.png")
    save_image(tmp_path / "a.JPG")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf a cat,\n sitting \n")
    (tmp_path / "notes.md").write_text("mine")
    examples = read_set(tmp_path, repeats=3).examples
    assert [(e.image.name, e.caption, e.repeats) for e in examples] == [
        ("a.JPG", "a cat, sitting", 3),
        ("b.png", "", 3),
    ]


def test_kohya_folders_set_repeats_and_class_words(tmp_path: Path):
    save_image(tmp_path / "10_sks cat" / "x.png")
    save_image(tmp_path / "2_dog" / "y.png")
    (tmp_path / "2_dog" / "y.caption").write_text("a dog that runs")
    examples = read_set(tmp_path).examples
    assert [(e.caption, e.repeats) for e in examples] == [("sks cat", 10), ("a dog that runs", 2)]


def test_unreadable_files_are_refused_by_name(tmp_path: Path):
    with pytest.raises(Refused, match="no such folder"):
        read_set(tmp_path / "none")
    with pytest.raises(Refused, match="no images"):
        read_set(tmp_path)
    save_image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("Bär".encode("latin-1"))
    with pytest.raises(Refused, match=r"a\.txt is not UTF-8: save it as UTF-8 or delete it"):
        read_set(tmp_path)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(Refused, match=r"broken\.png: cannot be read as an image"):
        read_rgb(tmp_path / "broken.png")


def test_images_are_rotated_upright_and_composited_over_white(tmp_path: Path):
    rotated = Image.new("RGB", (40, 20), "red")
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "rotated.jpg", exif=exif)
    assert read_size(tmp_path / "rotated.jpg") == Size(20, 40)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_rgb(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("P", (8, 8), 0).save(tmp_path / "palette.gif", transparency=0)
    assert read_rgb(tmp_path / "palette.gif").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 64), (1024, 32), (64, 16)])
def test_bucket_sides_are_multiples_of_the_step_within_the_area_and_one_bucket_is_square(resolution: int, step: int):
    sizes = bucket_sizes(resolution, step)
    assert sizes[0] == Size(resolution, resolution) and len(set(sizes)) == len(sizes)
    for size in sizes:
        assert size.width % step == size.height % step == 0 < min(size.width, size.height)
        assert size.width * size.height <= resolution**2
        assert Size(size.height, size.width) in sizes


@pytest.mark.parametrize("shape", [(50, 300), (300, 50), (4000, 10), (1, 1), (1920, 1080)])
def test_every_crop_is_valid_and_inside_its_image(shape: tuple[int, int]):
    crop = center_crop(Size(*shape), nearest_bucket(Size(*shape), bucket_sizes(512, 64)))
    assert min(crop.target.width, crop.target.height) >= 64
    assert 0 <= crop.left <= crop.resized.width - crop.target.width
    assert 0 <= crop.top <= crop.resized.height - crop.target.height


def test_a_center_crop_is_the_center_of_the_image(tmp_path: Path):
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    wide.save(tmp_path / "wide.png")
    pixels = cropped(tmp_path / "wide.png", center_crop(Size(300, 100), Size(64, 64)))
    assert pixels.shape == (3, 64, 64)
    np.testing.assert_allclose(pixels[:, 32, 32], [-1, -1, 1])
    assert float(pixels[2].mean()) > 0.9


@pytest.mark.parametrize("batch", [1, 3, 4, 7])
def test_every_image_is_used_exactly_repeats_times_in_every_epoch(batch: int):
    buckets, repeats = ["square"] * 9 + ["tall"] * 4 + ["wide"], [1, 2, 1, 1, 5, 1, 1, 1, 1, 2, 2, 2, 1, 3]
    for epoch in range(3):
        batches = epoch_batches(buckets, repeats, batch, seed=0, epoch=epoch)
        assert Counter(index for one in batches for index in one) == Counter(dict(enumerate(repeats)))
        assert all(len({buckets[index] for index in one}) == 1 and 1 <= len(one) <= batch for one in batches)
        assert len(batches) == batches_per_epoch(buckets, repeats, batch)


def test_the_order_depends_only_on_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[list[int]]:
        return epoch_batches(["a"] * 20, [1] * 20, 4, seed, epoch)

    assert order(1, 2) == order(1, 2)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_the_trigger_is_in_every_caption_exactly_once():
    assert with_trigger("a cat", "zwx style") == "zwx style, a cat"
    assert with_trigger("a cat, ZWX style", "zwx style") == "a cat, ZWX style"
    assert with_trigger("", "zwx style") == "zwx style" and with_trigger("a cat", "") == "a cat"
    assert with_trigger("a cat,", "zwx style", "end") == "a cat, zwx style"
    assert with_trigger("ZWX style, a cat", "zwx style", "end") == "ZWX style, a cat"
    assert with_trigger("", "zwx style", "end") == "zwx style"


def test_tags_after_the_kept_ones_are_shuffled_and_captions_are_dropped_with_the_given_probability():
    def one(step: int, dropout: float = 0.0) -> str:
        rules = Captions(shuffle_tags=True, keep_tags=1, caption_dropout=dropout)
        return caption_at_step(["cat, a, b, c, d"], rules, seed=0, step=step, index=0)

    seen = {one(step) for step in range(50)}
    assert len(seen) > 10 and all(caption.startswith("cat, ") for caption in seen)
    assert all(sorted(caption.split(", ")) == ["a", "b", "c", "cat", "d"] for caption in seen)
    assert one(7) == one(7)
    dropped = sum(one(step, dropout=0.2) == "" for step in range(2000))
    assert 320 < dropped < 480
