"""The latent cache on disk: never stale, robust to damage, and equal to freshly encoded latents."""

import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from runs import SAMPLES, train_run

from scumble.configs.errors import Refused
from scumble.configs.options import Model
from scumble.datasets.cache import Cache
from scumble.datasets.reading.images import Crop, Size, center_crop, read_size
from scumble.trainer import cli
from scumble.trainer.base_model.detect import detect_base
from scumble.trainer.base_model.latents import MAX_RESIDENT_BYTES, Latents, encode_set
from scumble.trainer.base_model.load import Base, load

View = tuple[Path, Sequence[Crop]]


@pytest.fixture(scope="module")
def base() -> Base:
    return load(Model(), detect_base(Model()), torch.device("cpu"), torch.float32)


@pytest.fixture
def views(tmp_path: Path) -> list[View]:
    """Three copied images, each with an upright and a mirrored crop."""
    found = []
    for path in sorted(SAMPLES.glob("*.webp"))[:3]:
        own = Path(shutil.copy(path, tmp_path))
        crop = center_crop(read_size(own), Size(64, 64))
        found.append((own, (crop, replace(crop, mirrored=True))))
    return found


def encoded(
    base: Base, views: Sequence[View], cache: Cache | None, max_resident_bytes: int = MAX_RESIDENT_BYTES
) -> tuple[Latents, int]:
    """Return the latents, and the number of forward passes of the VAE encoder."""
    passes = []
    hook = base.vae.encoder.register_forward_pre_hook(lambda module, inputs: passes.append(1))
    try:
        return encode_set(base, views, cache=cache, max_resident_bytes=max_resident_bytes), len(passes)
    finally:
        hook.remove()


def assert_same(ours: Latents, theirs: Latents) -> None:
    for one, other in ((ours.mean, theirs.mean), (ours.std, theirs.std)):
        for mine, yours in zip(one, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, yours, strict=True))


def test_cached_latents_equal_uncached_ones(base: Base, views: list[View], tmp_path: Path):
    cache = Cache(tmp_path / "cache")
    plain, passes = encoded(base, views, None)
    first, written = encoded(base, views, cache)
    second, read = encoded(base, views, cache)
    assert (passes, written, read) == (6, 6, 0)
    assert_same(first, plain)
    assert_same(second, plain)
    assert len(cache.sizes()) == 3


@pytest.mark.parametrize("change", ["the image", "the crop", "the VAE", "the mirrored crop"])
def test_a_change_that_affects_the_latents_encodes_them_again(
    change: str, base: Base, views: list[View], tmp_path: Path
):
    cache = Cache(tmp_path / "cache")
    encoded(base, views, cache)
    path, crops = views[0]
    weight = base.vae.encoder.conv_in.weight
    try:
        if change == "the image":
            ImageOps.flip(Image.open(path)).save(path, lossless=True)
        elif change == "the crop":
            views[0] = (path, tuple(replace(crop, left=crop.left + 1) for crop in crops))
        elif change == "the VAE":
            weight.data[0, 0, 0, 0] += 1e-3
        else:
            views[0] = (path, crops[:1])
        _, passes = encoded(base, views, cache)
        assert passes == {"the image": 2, "the crop": 2, "the VAE": 6, "the mirrored crop": 1}[change]
    finally:
        if change == "the VAE":
            weight.data[0, 0, 0, 0] -= 1e-3


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_entry_is_encoded_again(damage: str, base: Base, views: list[View], tmp_path: Path):
    cache = Cache(tmp_path / "cache")
    plain, _ = encoded(base, views, cache)
    entry = next((tmp_path / "cache").glob("??/*"))
    content = bytearray(entry.read_bytes())
    content[-3] ^= 1
    entry.write_bytes({"cut": content[: len(content) // 2], "flipped": content, "empty": b""}[damage])
    again, passes = encoded(base, views, cache)
    assert passes == 2
    assert_same(again, plain)
    assert encoded(base, views, cache)[1] == 0


def test_non_finite_latents_are_never_cached(base: Base, views: list[View], tmp_path: Path):
    weight = base.vae.encoder.conv_in.weight
    before = weight.data.clone()
    weight.data[0] = math.nan
    try:
        with pytest.raises(Refused, match=rf"{views[0][0].name}: the VAE outputs non-finite values; choose"):
            encoded(base, views, Cache(tmp_path / "cache"))
    finally:
        weight.data.copy_(before)
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_a_dataset_that_does_not_fit_in_memory_is_read_on_demand(base: Base, views: list[View], tmp_path: Path):
    plain, _ = encoded(base, views, None)
    streamed, _ = encoded(base, views, Cache(tmp_path / "cache"), max_resident_bytes=1000)
    assert not isinstance(streamed.mean, list) and len(streamed.mean) == 3
    assert_same(streamed, plain)
    noise = torch.randn(4, 16, 16)
    assert torch.equal(streamed.sample([(1, 1), (2, 0)], noise), plain.sample([(1, 1), (2, 0)], noise))
    with pytest.raises(Refused, match="--latent-cache off: the latents of 3 images do not fit into memory"):
        encoded(base, views, None, max_resident_bytes=1000)


def test_a_read_only_cache_is_reported_and_training_continues_without_it(base: Base, views: list[View], tmp_path: Path):
    (tmp_path / "file").touch()
    messages: list[str] = []
    found = encode_set(base, views, cache=Cache(tmp_path / "file"), report=messages.append)
    assert_same(found, encoded(base, views, None)[0])
    assert len(messages) == 1 and "cannot be written (Not a directory); continuing without the cache" in messages[0]
    with pytest.raises(Refused, match=r"cannot be written \(Not a directory\)") as error:
        encode_set(base, views, cache=Cache(tmp_path / "file"), max_resident_bytes=1000)
    assert error.value.exit_code == 73


def test_entries_dated_in_the_future_are_cleared_too(tmp_path: Path):
    cache = Cache(tmp_path)
    cache.put("ab", {"x": torch.ones(1)})
    (entry,) = tmp_path.rglob("*.safetensors")
    ahead = time.time() + 1e6
    os.utime(entry, (ahead, ahead))
    assert cache.clear(older_than_days=1) == (0, 0)
    assert cache.clear()[0] == 1 and cache.sizes() == []


def test_a_second_run_uses_cached_latents_and_the_cache_can_be_listed_and_cleared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cache = str(tmp_path / "cache")
    no_previews = {"preview_every": 0}
    first, second = (train_run(tmp_path, data={"images": str(SAMPLES), "latent_cache": cache}, output=no_previews)
                     for _ in range(2))  # fmt: skip
    assert first.losses == second.losses
    cli.main(["cache", "list", "--folder", cache])
    size = sum(file.stat().st_size for file in Path(cache).glob("??/*"))
    assert f"{cache}: 20 entries, {size / 1e3:.0f} kB" in capsys.readouterr().out
    cli.main(["cache", "clear", "--folder", cache, "--older-than", "1"])
    assert "0 entries deleted" in capsys.readouterr().out
    cli.main(["cache", "clear", "--folder", cache])
    assert "20 entries deleted" in capsys.readouterr().out and not list(Path(cache).glob("??/*"))
