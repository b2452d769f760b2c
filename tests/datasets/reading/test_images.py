"""Reading image files: upright sRGB pixels equal those of other programs, or those computed from the format."""

import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from icc import adobe_rgb, adobe_to_srgb, cmyk, gray_gamma, lab_to_srgb, srgb_curve
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


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def max_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest difference between two images, in levels of 255."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
def test_every_exif_orientation_is_applied_as_in_pillow_and_opencv(suffix: str, orientation: int, tmp_path: Path):
    path, exif = tmp_path / f"rotated.{suffix}", Image.Exif()
    exif[ORIENTATION] = orientation
    plain().save(path, exif=exif)
    ours = read_rgb(path)
    with Image.open(path) as opened:
        assert max_difference(pixels(ours), pixels(ImageOps.exif_transpose(opened).convert("RGB"))) == 0
    assert read_size(path) == Size(*ours.size) == (Size(40, 28) if orientation < 5 else Size(28, 40))
    if suffix in ("jpg", "png", "webp"):  # OpenCV ignores the orientation of AVIF, and cannot read a rotated TIFF
        theirs = cv2.imread(str(path))
        assert theirs is not None and max_difference(pixels(ours), theirs[..., ::-1].astype(int)) <= 1


@pytest.mark.parametrize("kind", [b"eXIf", b"iTXt"])
def test_png_metadata_after_the_pixels_is_applied_and_otherwise_reading_the_size_decodes_no_pixels(
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


def test_heic_images_are_read(tmp_path: Path):
    plain().save(tmp_path / "phone.heic", quality=-1, chroma=444)  # lossless except for YCbCr
    assert max_difference(pixels(read_rgb(tmp_path / "phone.heic")), pixels(plain())) <= 5
    assert read_size(tmp_path / "phone.heic") == Size(40, 28)


def test_heic_without_its_extra_is_left_out_with_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
def test_transparency_is_composited_over_white(kind: str, tmp_path: Path):
    path = tmp_path / kind
    if kind.startswith("palette"):
        plain().quantize(8).save(path, transparency=2)
    else:
        with_alpha().save(path, lossless=True)
    with Image.open(path) as opened:
        straight = pixels(opened.convert("RGBA"))
    share = straight[..., 3:] / 255
    assert share.min() == 0
    assert max_difference(pixels(read_rgb(path)), straight[..., :3] * share + 255 * (1 - share)) <= 1
    alpha = read_alpha(path)
    assert alpha and max_difference(pixels(alpha), straight[..., 3]) == 0


def test_an_opaque_alpha_channel_is_none(tmp_path: Path):
    plain().convert("RGBA").save(tmp_path / "opaque.png")
    assert read_alpha(tmp_path / "opaque.png") is None


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_images_equal_those_of_opencv_scaled_to_8_bits(suffix: str, tmp_path: Path):
    slope = np.linspace(0, 65535, 40 * 28).astype(np.uint16).reshape(28, 40)
    gray, color = tmp_path / f"gray.{suffix}", tmp_path / f"color.{suffix}"
    cv2.imwrite(str(gray), slope)
    cv2.imwrite(str(color), np.stack([slope, slope.T.reshape(28, 40), slope[::-1]], -1))
    theirs = cv2.imread(str(gray), cv2.IMREAD_UNCHANGED)
    assert theirs is not None and theirs.dtype == np.uint16
    assert max_difference(pixels(read_rgb(gray))[..., 0], theirs / 257) <= 0.5
    theirs = cv2.imread(str(color), cv2.IMREAD_UNCHANGED)
    assert theirs is not None and max_difference(pixels(read_rgb(color)), theirs[..., ::-1] / 257) <= 1


def test_floating_point_images_are_read_from_0_to_1_and_refused_outside(tmp_path: Path):
    slope = np.linspace(0, 1, 40 * 28, dtype=np.float32).reshape(28, 40)
    Image.fromarray(slope).save(tmp_path / "slope.tif")
    assert max_difference(pixels(read_rgb(tmp_path / "slope.tif"))[..., 1], slope * 255.0) <= 0.5
    Image.fromarray(slope * 300).save(tmp_path / "bright.tif")
    assert "save it with 8 or 16 bits" in check_pixels(tmp_path / "bright.tif")


def test_colors_are_converted_to_srgb_with_the_matrices_of_the_profile(tmp_path: Path):
    rng = np.random.default_rng(0)
    colors = rng.integers(90, 180, (28, 40, 3))  # well inside both gamuts
    Image.fromarray(colors.astype(np.uint8)).save(tmp_path / "adobe.png", icc_profile=adobe_rgb())
    ours = pixels(read_rgb(tmp_path / "adobe.png"))
    assert max_difference(ours, adobe_to_srgb(colors)) <= 1.5
    assert max_difference(ours, colors) > 10  # the profile makes a difference


def test_gray_profiles_and_profiles_of_images_with_alpha_are_applied(tmp_path: Path):
    slope = np.tile(np.arange(0, 240, 6, dtype=np.uint8), (28, 1))
    Image.fromarray(slope).save(tmp_path / "gray.png", icc_profile=gray_gamma(1.75))
    ours = pixels(read_rgb(tmp_path / "gray.png"))
    assert max_difference(ours[..., 0], 255 * srgb_curve((slope / 255) ** 1.75)) <= 1.5
    image = Image.fromarray(np.full((8, 8, 4), (90, 150, 120, 255), np.uint8))
    image.putalpha(128)
    image.save(tmp_path / "adobe.png", icc_profile=adobe_rgb())
    expected = adobe_to_srgb(np.array([90, 150, 120])) * 128 / 255 + 255 * 127 / 255
    assert np.abs(pixels(read_rgb(tmp_path / "adobe.png"))[0, 0] - expected).max() <= 1.5


def test_cmyk_is_converted_with_its_profile_or_otherwise_as_in_pillow(tmp_path: Path):
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
        assert max_difference(pixels(read_rgb(tmp_path / "bare.jpg")), pixels(opened.convert("RGB"))) == 0


def test_an_image_with_a_broken_profile_or_exif_is_still_read(tmp_path: Path):
    plain().save(tmp_path / "profile.png", icc_profile=b"no profile")
    plain().save(tmp_path / "wrong.png", icc_profile=gray_gamma(2.2))
    plain().save(tmp_path / "exif.png", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    for name in ("profile.png", "wrong.png", "exif.png"):
        assert max_difference(pixels(read_rgb(tmp_path / name)), pixels(plain())) == 0


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation_is_read(suffix: str, tmp_path: Path):
    path = tmp_path / f"animated.{suffix}"
    frames = [Image.new("RGB", (16, 16), color) for color in ("blue", "red", "lime")]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert read_rgb(path).getpixel((8, 8)) == (0, 0, 255)


def test_the_error_names_what_a_file_is_instead_of_an_image(tmp_path: Path):
    files = {
        "empty.png": (b"", "the file is empty"),
        "page.jpg": (b"<!DOCTYPE html><html>", "it is a web page"),
        "lfs.png": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        "words.webp": (b"just some words", "unknown format"),
        "truncated.png": (b"", "truncated"),
    }
    plain().save(tmp_path / "truncated.png")
    files["truncated.png"] = ((tmp_path / "truncated.png").read_bytes()[:-60], "truncated")
    for name, (data, reason) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(Refused, match=rf"{name}: cannot be read as an image \(.*fix or remove it"):
            read_rgb(tmp_path / name)
        assert reason.lower() in check_pixels(tmp_path / name).lower()


def test_the_format_is_detected_by_content_not_by_name(tmp_path: Path):
    plain().save(tmp_path / "really.png")
    os.rename(tmp_path / "really.png", tmp_path / "really.jpg")  # noqa: PTH104
    assert max_difference(pixels(read_rgb(tmp_path / "really.jpg")), pixels(plain())) == 0


def test_an_image_of_100_megapixels_is_read_and_a_decompression_bomb_is_refused(tmp_path: Path):
    Image.new("L", (11600, 8700), 77).save(tmp_path / "large.jpg", quality=20)
    assert check_pixels(tmp_path / "large.jpg") == "" and read_size(tmp_path / "large.jpg") == Size(11600, 8700)
    assert cropped(tmp_path / "large.jpg", center_crop(Size(11600, 8700), Size(64, 64))).shape == (3, 64, 64)
    plain().save(tmp_path / "bomb.png")
    data = bytearray((tmp_path / "bomb.png").read_bytes())
    data[16:24] = struct.pack(">II", 20000, 20000)  # the size in the header, and then its checksum
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "bomb.png").write_bytes(data)
    assert "20000x20000 is over 300 million pixels" in check_pixels(tmp_path / "bomb.png")


def test_a_crop_equals_resizing_the_whole_image_and_cropping_it(tmp_path: Path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (90, 160, 3), dtype=np.uint8)).save(tmp_path / "noise.png")
    for share in (0.0, 0.37, 1.0):
        crop = crop_at(Size(160, 90), Size(48, 64), share)
        whole = read_rgb(tmp_path / "noise.png").resize((crop.resized.width, 64), Image.Resampling.LANCZOS)
        expected = pixels(whole)[:, crop.left : crop.left + 48]
        ours = (cropped(tmp_path / "noise.png", crop).permute(1, 2, 0).numpy() + 1) * 127.5
        assert max_difference(ours, expected) <= 1
        mirrored = cropped(tmp_path / "noise.png", crop_at(Size(160, 90), Size(48, 64), share, mirrored=True))
        assert max_difference((mirrored.permute(1, 2, 0).numpy() + 1) * 127.5, ours[:, ::-1]) < 1e-4


def test_a_large_jpeg_decoded_at_reduced_size_gives_the_same_crop(tmp_path: Path):
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)).resize((3000, 2000))
    rough.save(tmp_path / "photo.jpg", quality=95)
    crop = center_crop(Size(3000, 2000), Size(128, 128))
    whole = read_rgb(tmp_path / "photo.jpg")
    assert read_rgb(tmp_path / "photo.jpg", Size(3 * crop.resized.width, 3 * 128)).width == 750 < whole.width
    full = images.resized(whole, crop, crop.target, Image.Resampling.LANCZOS)
    ours = (cropped(tmp_path / "photo.jpg", crop).permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(ours - pixels(full)).mean() < 0.5 and max_difference(ours, pixels(full)) <= 4


def test_cropping_an_extremely_narrow_image_does_not_resize_all_of_it(tmp_path: Path):
    Image.new("RGB", (1, 5000), "red").save(tmp_path / "narrow.png")
    crop = center_crop(Size(1, 5000), Size(320, 832))
    assert crop.resized == Size(320, 1_600_000)
    assert cropped(tmp_path / "narrow.png", crop).shape == (3, 832, 320)


def test_the_corner_of_a_mirrored_crop_is_measured_from_its_other_side():
    crop = Crop(Size(200, 100), Size(128, 64), 10, 0, Size(64, 64))
    assert crop.corner == (10, 0) and crop.cut == 0.5
    assert Crop(Size(200, 100), Size(128, 64), 10, 0, Size(64, 64), mirrored=True).corner == (54, 0)
