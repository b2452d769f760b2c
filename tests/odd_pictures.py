"""Writes a corpus of intact and damaged images in every format, with every kind of damage. Deterministic."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image

pillow_heif.register_heif_opener()

WIDTH, HEIGHT = 40, 28


def plain() -> Image.Image:
    """Return an image of gradients and a square, which every codec preserves well."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([columns * 6, rows * 9, np.where((rows > 8) & (rows < 18) & (columns > 20), 220, 40)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def with_alpha() -> Image.Image:
    image = plain().convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))))
    return image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def deep(kind: str) -> Image.Image:
    """Return the image in grayscale with 16 bits, or as floating point from 0 to 1."""
    values = np.asarray(plain().convert("L"), dtype=np.float32) / 255
    return Image.fromarray(values if kind == "F" else (values * 65535).astype(np.uint16))


FORMATS: dict[str, Callable[[], bytes]] = {
    "baseline.jpg": lambda: encoded(plain(), "JPEG"),
    "progressive.jpg": lambda: encoded(plain(), "JPEG", progressive=True),
    "gray.jpg": lambda: encoded(plain().convert("L"), "JPEG"),
    "cmyk.jpg": lambda: encoded(plain().convert("CMYK"), "JPEG"),
    "mpo.jpg": lambda: encoded(plain(), "MPO", save_all=True, append_images=[plain().rotate(180)]),
    "rgb.png": lambda: encoded(plain(), "PNG"),
    "alpha.png": lambda: encoded(with_alpha(), "PNG"),
    "palette.png": lambda: encoded(plain().quantize(16), "PNG", transparency=3),
    "gray.png": lambda: encoded(plain().convert("L"), "PNG"),
    "grayalpha.png": lambda: encoded(with_alpha().convert("LA"), "PNG"),
    "bits.png": lambda: encoded(plain().convert("1"), "PNG"),
    "sixteen.png": lambda: encoded(deep("I"), "PNG"),
    "animated.png": lambda: encoded(plain(), "PNG", save_all=True, append_images=[plain().rotate(180)]),
    "lossy.webp": lambda: encoded(plain(), "WEBP"),
    "lossless.webp": lambda: encoded(with_alpha(), "WEBP", lossless=True),
    "animated.webp": lambda: encoded(plain(), "WEBP", save_all=True, append_images=[plain().rotate(180)]),
    "plain.bmp": lambda: encoded(plain(), "BMP"),
    "palette.bmp": lambda: encoded(plain().quantize(16), "BMP"),
    "still.gif": lambda: encoded(plain(), "GIF"),
    "animated.gif": lambda: encoded(plain(), "GIF", save_all=True, append_images=[plain().rotate(180)]),
    "raw.tif": lambda: encoded(plain(), "TIFF"),
    "lzw.tiff": lambda: encoded(with_alpha(), "TIFF", compression="tiff_lzw"),
    "jpeg.tif": lambda: encoded(plain(), "TIFF", compression="jpeg"),
    "sixteen.tif": lambda: encoded(deep("I"), "TIFF"),
    "float.tif": lambda: encoded(deep("F"), "TIFF"),
    "cmyk.tif": lambda: encoded(plain().convert("CMYK"), "TIFF"),
    "lab.tif": lambda: encoded(Image.new("LAB", (WIDTH, HEIGHT), (120, 30, 200)), "TIFF"),
    "plain.avif": lambda: encoded(plain(), "AVIF"),
    "alpha.avif": lambda: encoded(with_alpha(), "AVIF"),
    "phone.heic": lambda: encoded(plain(), "HEIF"),
}


def corrupted(data: bytes, start: float, end: float, count: int, seed: int) -> bytes:
    """Overwrite `count` bytes at random positions between two shares of the file."""
    rng = np.random.default_rng(seed)
    out = bytearray(data)
    for position in rng.integers(int(start * len(data)), max(1, int(end * len(data))), count):
        out[position] = int(rng.integers(256))
    return bytes(out)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "whole": lambda data: data,
    "empty": lambda data: b"",
    "one-byte": lambda data: data[:1],
    "header-only": lambda data: data[:32],
    "half": lambda data: data[: len(data) // 2],
    "truncated-tail": lambda data: data[: len(data) * 9 // 10],
    "truncated-last": lambda data: data[:-1],
    "no-start": lambda data: b"\0\0\0\0" + data[4:],
    "corrupted-start": lambda data: corrupted(data, 0.0, min(1.0, 64 / len(data)), 6, 1),
    "corrupted-all": lambda data: corrupted(data, 0.0, 1.0, 12, 2),
    "corrupted-end": lambda data: corrupted(data, 0.5, 1.0, 30, 3),
    "zeros": lambda data: data[: len(data) // 3] + bytes(len(data) // 3) + data[len(data) // 3 * 2 :],
    "twice": lambda data: data + data,
    "text-after": lambda data: data + b"\n<html>hello</html>" * 20,
}


def write_corpus(folder: Path) -> list[Path]:
    """Write every format with every damage, in one folder per damage."""
    paths = []
    for damage, apply in DAMAGES.items():
        (folder / damage).mkdir(parents=True)
        for name, make in FORMATS.items():
            path = folder / damage / f"{Path(name).stem}-{Path(name).suffix[1:]}{Path(name).suffix}"
            path.write_bytes(apply(make()))
            paths.append(path)
    return paths
