"""A corpus of good, odd and damaged pictures: every format × every damage, made from a seed."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image

pillow_heif.register_heif_opener()

WIDTH, HEIGHT = 40, 28


def plain() -> Image.Image:
    """Slopes and a square: something that every codec keeps recognisable."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([columns * 6, rows * 9, np.where((rows > 8) & (rows < 18) & (columns > 20), 220, 40)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def with_alpha() -> Image.Image:
    picture = plain().convert("RGBA")
    picture.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))))
    return picture


def saved(picture: Image.Image, kind: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **how)
    return buffer.getvalue()


def deep(kind: str) -> Image.Image:
    """The red channel in 16 bits, or as floating point from 0 to 1."""
    values = np.asarray(plain().convert("L"), dtype=np.float32) / 255
    return Image.fromarray(values if kind == "F" else (values * 65535).astype(np.uint16))


FORMATS: dict[str, Callable[[], bytes]] = {
    "baseline.jpg": lambda: saved(plain(), "JPEG"),
    "progressive.jpg": lambda: saved(plain(), "JPEG", progressive=True),
    "grey.jpg": lambda: saved(plain().convert("L"), "JPEG"),
    "cmyk.jpg": lambda: saved(plain().convert("CMYK"), "JPEG"),
    "mpo.jpg": lambda: saved(plain(), "MPO", save_all=True, append_images=[plain().rotate(180)]),
    "rgb.png": lambda: saved(plain(), "PNG"),
    "alpha.png": lambda: saved(with_alpha(), "PNG"),
    "palette.png": lambda: saved(plain().quantize(16), "PNG", transparency=3),
    "grey.png": lambda: saved(plain().convert("L"), "PNG"),
    "greyalpha.png": lambda: saved(with_alpha().convert("LA"), "PNG"),
    "bits.png": lambda: saved(plain().convert("1"), "PNG"),
    "sixteen.png": lambda: saved(deep("I"), "PNG"),
    "moving.png": lambda: saved(plain(), "PNG", save_all=True, append_images=[plain().rotate(180)]),
    "lossy.webp": lambda: saved(plain(), "WEBP"),
    "lossless.webp": lambda: saved(with_alpha(), "WEBP", lossless=True),
    "moving.webp": lambda: saved(plain(), "WEBP", save_all=True, append_images=[plain().rotate(180)]),
    "plain.bmp": lambda: saved(plain(), "BMP"),
    "palette.bmp": lambda: saved(plain().quantize(16), "BMP"),
    "still.gif": lambda: saved(plain(), "GIF"),
    "moving.gif": lambda: saved(plain(), "GIF", save_all=True, append_images=[plain().rotate(180)]),
    "raw.tif": lambda: saved(plain(), "TIFF"),
    "lzw.tiff": lambda: saved(with_alpha(), "TIFF", compression="tiff_lzw"),
    "jpeg.tif": lambda: saved(plain(), "TIFF", compression="jpeg"),
    "sixteen.tif": lambda: saved(deep("I"), "TIFF"),
    "float.tif": lambda: saved(deep("F"), "TIFF"),
    "cmyk.tif": lambda: saved(plain().convert("CMYK"), "TIFF"),
    "lab.tif": lambda: saved(Image.new("LAB", (WIDTH, HEIGHT), (120, 30, 200)), "TIFF"),
    "plain.avif": lambda: saved(plain(), "AVIF"),
    "alpha.avif": lambda: saved(with_alpha(), "AVIF"),
    "phone.heic": lambda: saved(plain(), "HEIF"),
}


def struck(data: bytes, start: float, end: float, count: int, seed: int) -> bytes:
    """`count` bytes overwritten at random places between two shares of the file."""
    draw = np.random.default_rng(seed)
    out = bytearray(data)
    for place in draw.integers(int(start * len(data)), max(1, int(end * len(data))), count):
        out[place] = int(draw.integers(256))
    return bytes(out)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "whole": lambda data: data,
    "empty": lambda data: b"",
    "one-byte": lambda data: data[:1],
    "header-only": lambda data: data[:32],
    "half": lambda data: data[: len(data) // 2],
    "cut-tail": lambda data: data[: len(data) * 9 // 10],
    "cut-last": lambda data: data[:-1],
    "no-start": lambda data: b"\0\0\0\0" + data[4:],
    "struck-start": lambda data: struck(data, 0.0, min(1.0, 64 / len(data)), 6, 1),
    "struck-all": lambda data: struck(data, 0.0, 1.0, 12, 2),
    "struck-end": lambda data: struck(data, 0.5, 1.0, 30, 3),
    "zeros": lambda data: data[: len(data) // 3] + bytes(len(data) // 3) + data[len(data) // 3 * 2 :],
    "twice": lambda data: data + data,
    "text-behind": lambda data: data + b"\n<html>hello</html>" * 20,
}


def write_corpus(folder: Path) -> list[Path]:
    """Every format with every damage, in one folder for each damage."""
    paths = []
    for damage, harm in DAMAGES.items():
        (folder / damage).mkdir(parents=True)
        for name, make in FORMATS.items():
            path = folder / damage / f"{Path(name).stem}-{Path(name).suffix[1:]}{Path(name).suffix}"
            path.write_bytes(harm(make()))
            paths.append(path)
    return paths
