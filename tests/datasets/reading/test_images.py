"""Any picture file becomes the same upright sRGB pixels that other programs, or the arithmetic of its format, give."""

import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from icc import adobe_rgb, adobe_to_srgb, cmyk, grey_gamma, lab_to_srgb, srgb_curve
from odd_pictures import plain, with_alpha
from PIL import Image, ImageOps

from scumble.configs.errors import Refused
from scumble.datasets.reading import images
from scumble.datasets.reading.folder import read_set
from scumble.datasets.reading.images import (  # fmt: skip
    Crop,
    Size,
    center_crop,
    check_pixels,
    crop_at,
    read_alpha,
    read_rgb,
    read_size,
)
from scumble.datasets.tensors import cropped

ORIENTATION = 0x0112


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of two pictures, in levels of 255."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
def test_every_orientation_is_turned_upright_as_pillow_and_opencv_turn_it(
    suffix: str, orientation: int, tmp_path: Path
):
    path, exif = tmp_path / f"turned.{suffix}", Image.Exif()
    exif[ORIENTATION] = orientation
    plain().save(path, exif=exif)
    ours = read_rgb(path)
    with Image.open(path) as opened:
        assert apart(pixels(ours), pixels(ImageOps.exif_transpose(opened).convert("RGB"))) == 0
    assert read_size(path) == Size(*ours.size) == (Size(40, 28) if orientation < 5 else Size(28, 40))
    if suffix in ("jpg", "png", "webp"):  # OpenCV leaves AVIF as it lies, and cannot turn a TIFF on its side
        theirs = cv2.imread(str(path))
        assert theirs is not None and apart(pixels(ours), theirs[..., ::-1].astype(int)) <= 1


@pytest.mark.parametrize("kind", [b"eXIf", b"iTXt"])
def test_what_a_png_tells_behind_its_pixels_turns_it_too_and_else_they_are_not_decoded_for_its_size(
    kind: bytes, tmp_path: Path
):
    path, exif = tmp_path / "late.png", Image.Exif()
    exif[ORIENTATION] = 6
    plain().save(path)
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    data = {b"eXIf": exif.tobytes().removeprefix(b"Exif\0\0"), b"iTXt": xmp}[kind]
    chunk = len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    whole = path.read_bytes()
    path.write_bytes(whole[:-12] + chunk + whole[-12:])
    assert read_size(path) == Size(*read_rgb(path).size) == Size(28, 40)
    first = whole.index(b"IDAT") + 4
    path.write_bytes(whole[:first] + bytes(len(whole) - 16 - first) + whole[-16:])
    assert read_size(path) == Size(40, 28) and check_pixels(path)


def test_a_phones_heic_is_read(tmp_path: Path):
    plain().save(tmp_path / "phone.heic", quality=-1, chroma=444)  # lossless but for YCbCr
    assert apart(pixels(read_rgb(tmp_path / "phone.heic")), pixels(plain())) <= 5
    assert read_size(tmp_path / "phone.heic") == Size(40, 28)


def test_heic_without_its_extra_is_left_out_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain().save(tmp_path / "phone.heic")
    plain().save(tmp_path / "other.png")
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    images.formats.cache_clear()
    try:
        (left_out,) = read_set(tmp_path).left_out
    finally:
        images.formats.cache_clear()
    assert left_out.path.name == "phone.heic" and left_out.is_image
    assert left_out.reason == "HEIC needs pillow-heif: pip install 'scumble[heic]'"


@pytest.mark.parametrize("kind", ["alpha.png", "alpha.webp", "alpha.tif", "alpha.avif", "palette.png", "palette.gif"])
def test_transparency_lies_on_white_as_the_formula_says(kind: str, tmp_path: Path):
    path = tmp_path / kind
    if kind.startswith("palette"):
        plain().quantize(8).save(path, transparency=2)
    else:
        with_alpha().save(path, lossless=True)
    with Image.open(path) as opened:
        straight = pixels(opened.convert("RGBA"))
    share = straight[..., 3:] / 255
    assert share.min() == 0
    assert apart(pixels(read_rgb(path)), straight[..., :3] * share + 255 * (1 - share)) <= 1
    alpha = read_alpha(path)
    assert alpha and apart(pixels(alpha), straight[..., 3]) == 0


def test_an_opaque_alpha_channel_is_none(tmp_path: Path):
    plain().convert("RGBA").save(tmp_path / "opaque.png")
    assert read_alpha(tmp_path / "opaque.png") is None


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_those_of_opencv_scaled_to_eight(suffix: str, tmp_path: Path):
    slope = np.linspace(0, 65535, 40 * 28).astype(np.uint16).reshape(28, 40)
    grey, colour = tmp_path / f"grey.{suffix}", tmp_path / f"colour.{suffix}"
    cv2.imwrite(str(grey), slope)
    cv2.imwrite(str(colour), np.stack([slope, slope.T.reshape(28, 40), slope[::-1]], -1))
    theirs = cv2.imread(str(grey), cv2.IMREAD_UNCHANGED)
    assert theirs is not None and theirs.dtype == np.uint16
    assert apart(pixels(read_rgb(grey))[..., 0], theirs / 257) <= 0.5
    theirs = cv2.imread(str(colour), cv2.IMREAD_UNCHANGED)
    assert theirs is not None and apart(pixels(read_rgb(colour)), theirs[..., ::-1] / 257) <= 1


def test_floating_point_is_read_from_0_to_1_and_named_outside(tmp_path: Path):
    slope = np.linspace(0, 1, 40 * 28, dtype=np.float32).reshape(28, 40)
    Image.fromarray(slope).save(tmp_path / "slope.tif")
    assert apart(pixels(read_rgb(tmp_path / "slope.tif"))[..., 1], slope * 255.0) <= 0.5
    Image.fromarray(slope * 300).save(tmp_path / "bright.tif")
    assert "save it in 8 or 16 bits" in check_pixels(tmp_path / "bright.tif")


def test_colours_of_a_profile_become_srgb_as_its_matrices_say(tmp_path: Path):
    draw = np.random.default_rng(0)
    colours = draw.integers(90, 180, (28, 40, 3))  # well inside both gamuts
    Image.fromarray(colours.astype(np.uint8)).save(tmp_path / "adobe.png", icc_profile=adobe_rgb())
    ours = pixels(read_rgb(tmp_path / "adobe.png"))
    assert apart(ours, adobe_to_srgb(colours)) <= 1.5
    assert apart(ours, colours) > 10  # the profile matters


def test_a_grey_profile_and_one_on_a_picture_with_alpha_count_too(tmp_path: Path):
    slope = np.tile(np.arange(0, 240, 6, dtype=np.uint8), (28, 1))
    Image.fromarray(slope).save(tmp_path / "grey.png", icc_profile=grey_gamma(1.75))
    ours = pixels(read_rgb(tmp_path / "grey.png"))
    assert apart(ours[..., 0], 255 * srgb_curve((slope / 255) ** 1.75)) <= 1.5
    picture = Image.fromarray(np.full((8, 8, 4), (90, 150, 120, 255), np.uint8))
    picture.putalpha(128)
    picture.save(tmp_path / "adobe.png", icc_profile=adobe_rgb())
    expected = adobe_to_srgb(np.array([90, 150, 120])) * 128 / 255 + 255 * 127 / 255
    assert np.abs(pixels(read_rgb(tmp_path / "adobe.png"))[0, 0] - expected).max() <= 1.5


def test_cmyk_is_converted_by_its_profile_and_without_one_as_pillow_does(tmp_path: Path):
    inks = {tuple(index >> shift & 1 for shift in (3, 2, 1, 0)): (20.0, 0.0, 0.0) for index in range(16)}
    inks |= {(0, 0, 0, 0): (100.0, 0.0, 0.0), (1, 0, 0, 0): (60.0, -20.0, -30.0), (0, 0, 1, 0): (90.0, -5.0, 60.0)}
    squares = Image.new("CMYK", (30, 8), (0, 0, 0, 0))
    squares.paste((255, 0, 0, 0), (10, 0, 20, 8))
    squares.paste((0, 0, 255, 0), (20, 0, 30, 8))
    squares.save(tmp_path / "profile.tif", icc_profile=cmyk(inks))
    ours = pixels(read_rgb(tmp_path / "profile.tif"))
    for left, lab in ((0, (100, 0, 0)), (10, (60, -20, -30)), (20, (90, -5, 60))):
        assert np.abs(ours[4, left + 5] - lab_to_srgb(*lab)).max() <= 4, (lab, ours[4, left + 5])
    squares.save(tmp_path / "bare.jpg")
    with Image.open(tmp_path / "bare.jpg") as opened:
        assert apart(pixels(read_rgb(tmp_path / "bare.jpg")), pixels(opened.convert("RGB"))) == 0


def test_a_broken_profile_or_exif_does_not_lose_the_picture(tmp_path: Path):
    plain().save(tmp_path / "profile.png", icc_profile=b"no profile")
    plain().save(tmp_path / "wrong.png", icc_profile=grey_gamma(2.2))
    plain().save(tmp_path / "exif.png", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    for name in ("profile.png", "wrong.png", "exif.png"):
        assert apart(pixels(read_rgb(tmp_path / name)), pixels(plain())) == 0


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_read(suffix: str, tmp_path: Path):
    path = tmp_path / f"moving.{suffix}"
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("blue", "red", "lime")]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert read_rgb(path).getpixel((8, 8)) == (0, 0, 255)


def test_what_a_file_is_instead_of_a_picture_is_said(tmp_path: Path):
    said = {
        "empty.png": (b"", "it is empty"),
        "page.jpg": (b"<!DOCTYPE html><html>", "it is a web page"),
        "lfs.png": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        "words.webp": (b"just some words", "of no kind that is known"),
        "cut.png": (b"", "truncated"),
    }
    plain().save(tmp_path / "cut.png")
    said["cut.png"] = ((tmp_path / "cut.png").read_bytes()[:-60], "truncated")
    for name, (data, reason) in said.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(Refused, match=rf"{name}: cannot be read as a picture \(.*mend it or take it out"):
            read_rgb(tmp_path / name)
        assert reason.lower() in check_pixels(tmp_path / name).lower()


def test_the_kind_is_told_by_content_not_by_name(tmp_path: Path):
    plain().save(tmp_path / "really.png")
    os.rename(tmp_path / "really.png", tmp_path / "really.jpg")  # noqa: PTH104
    assert apart(pixels(read_rgb(tmp_path / "really.jpg")), pixels(plain())) == 0


def test_a_picture_of_100_megapixels_is_read_and_a_bomb_is_named(tmp_path: Path):
    Image.new("L", (11600, 8700), 77).save(tmp_path / "large.jpg", quality=20)
    assert check_pixels(tmp_path / "large.jpg") == "" and read_size(tmp_path / "large.jpg") == Size(11600, 8700)
    assert cropped(tmp_path / "large.jpg", center_crop(Size(11600, 8700), Size(64, 64))).shape == (3, 64, 64)
    plain().save(tmp_path / "bomb.png")
    data = bytearray((tmp_path / "bomb.png").read_bytes())
    data[16:24] = struct.pack(">II", 20000, 20000)  # in the header of a small file, and its checksum
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "bomb.png").write_bytes(data)
    assert "20000x20000 is over 300 million pixels" in check_pixels(tmp_path / "bomb.png")


def test_a_crop_is_what_resizing_all_and_cutting_gives(tmp_path: Path):
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (90, 160, 3), dtype=np.uint8)).save(tmp_path / "noise.png")
    for share in (0.0, 0.37, 1.0):
        crop = crop_at(Size(160, 90), Size(48, 64), share)
        whole = read_rgb(tmp_path / "noise.png").resize((crop.resized.width, 64), Image.Resampling.LANCZOS)
        cut = pixels(whole)[:, crop.left : crop.left + 48]
        ours = (cropped(tmp_path / "noise.png", crop).permute(1, 2, 0).numpy() + 1) * 127.5
        assert apart(ours, cut) <= 1
        mirrored = cropped(tmp_path / "noise.png", crop_at(Size(160, 90), Size(48, 64), share, mirrored=True))
        assert apart((mirrored.permute(1, 2, 0).numpy() + 1) * 127.5, ours[:, ::-1]) < 1e-4


def test_a_large_jpeg_decoded_smaller_gives_the_same_crop(tmp_path: Path):
    draw = np.random.default_rng(0)
    rough = Image.fromarray(draw.integers(0, 256, (200, 300, 3), dtype=np.uint8)).resize((3000, 2000))
    rough.save(tmp_path / "photo.jpg", quality=95)
    crop = center_crop(Size(3000, 2000), Size(128, 128))
    whole = read_rgb(tmp_path / "photo.jpg")
    assert read_rgb(tmp_path / "photo.jpg", Size(3 * crop.resized.width, 3 * 128)).width == 750 < whole.width
    full = images.resized(whole, crop, crop.target, Image.Resampling.LANCZOS)
    ours = (cropped(tmp_path / "photo.jpg", crop).permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(ours - pixels(full)).mean() < 0.5 and apart(ours, pixels(full)) <= 4


def test_a_thread_of_pixels_becomes_no_giant(tmp_path: Path):
    Image.new("RGB", (1, 5000), "red").save(tmp_path / "thread.png")
    crop = center_crop(Size(1, 5000), Size(320, 832))
    assert crop.resized == Size(320, 1_600_000)
    assert cropped(tmp_path / "thread.png", crop).shape == (3, 832, 320)


def test_the_corner_of_a_mirrored_crop_counts_from_its_other_side():
    crop = Crop(Size(200, 100), Size(128, 64), 10, 0, Size(64, 64))
    assert crop.corner == (10, 0) and crop.cut == 0.5
    assert Crop(Size(200, 100), Size(128, 64), 10, 0, Size(64, 64), mirrored=True).corner == (54, 0)
