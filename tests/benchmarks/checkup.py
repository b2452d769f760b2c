"""Detection rates and false alarms of `scumble check` on damaged copies of good images. Prints Markdown tables.

    python tests/benchmarks/checkup.py NAME=FOLDER… [--side 512] [--every 1]

Each image is reduced to at most SIDE² pixels, as for training, and damaged in known ways. A row shows, for each set,
the percentage of copies that exceed the threshold of the check; the rows "unchanged" are false alarms.
"""

import argparse
import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from scumble.datasets.checkup.duplicates import Likeness, likeness_of, same_picture
from scumble.datasets.checkup.exposure import exposure_of
from scumble.datasets.checkup.jpeg import block_steps
from scumble.datasets.checkup.letterbox import borders_of
from scumble.datasets.checkup.picture_checks import DARK, HIGH_STEPS, LIGHT, SOFT_PX
from scumble.datasets.checkup.sharpness import edge_blur
from scumble.datasets.checkup.watermarks import corners_of, stamps_in
from scumble.datasets.reading.images import SUFFIXES, read_rgb

Damage = Callable[[Image.Image], Image.Image]
NOISE = np.random.default_rng(0)


def unchanged(image: Image.Image) -> Image.Image:
    return image


def jpeg(quality: int) -> Damage:
    def damage(image: Image.Image) -> Image.Image:
        written = io.BytesIO()
        image.save(written, "JPEG", quality=quality)
        return Image.open(written).convert("RGB")

    return damage


def blur(sigma_px: float) -> Damage:
    return lambda image: image.filter(ImageFilter.GaussianBlur(sigma_px))


def noise(levels: float) -> Damage:
    def damage(image: Image.Image) -> Image.Image:
        pixels = np.asarray(image) + NOISE.normal(0, levels, (image.height, image.width, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    return damage


def resized(scale: float) -> Damage:
    def damage(image: Image.Image) -> Image.Image:
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        return image.resize(size, Image.Resampling.LANCZOS)

    return damage


def cropped(share: float) -> Damage:
    """Crop off-center, so that the content moves."""

    def damage(image: Image.Image) -> Image.Image:
        width, height = image.size
        left, top = 0.6 * share * width, 0.3 * share * height
        return image.crop(
            (round(left), round(top), round(left + width - share * width), round(top + height * (1 - share)))
        )

    return damage


def bars(share: float, color: str, sides: bool = False) -> Damage:
    def damage(image: Image.Image) -> Image.Image:
        thickness = round((image.width if sides else image.height) * share)
        return ImageOps.expand(image, (thickness, 0) if sides else (0, thickness), color)

    return damage


def gamma(power: float) -> Damage:
    return lambda image: image.point([round(255 * (level / 255) ** power) for level in range(256)] * 3)


def brightness(factor: float) -> Damage:
    return lambda image: ImageEnhance.Brightness(image).enhance(factor)


def watermarked(opacity: int, color: tuple[int, int, int]) -> Damage:
    def damage(image: Image.Image) -> Image.Image:
        size = max(10, image.width // 24)
        font, text = ImageFont.load_default(size), "© studio mira"
        position = image.width * 0.97 - font.getlength(text), image.height - 1.6 * size
        layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
        ImageDraw.Draw(layer).text(position, text, (*color, opacity), font)
        return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")

    return damage


def chain(*damages: Damage) -> Damage:
    def damage(image: Image.Image) -> Image.Image:
        for one in damages:
            image = one(image)
        return image

    return damage


COPIES: dict[str, Damage] = {
    "half the size": resized(0.5), "one eighth of the size": resized(0.125), "JPEG 10": jpeg(10), "JPEG 50": jpeg(50),
    "noise of 25 levels": noise(25), "blur of 2 px": blur(2), "darker (0.6)": brightness(0.6), "gamma 1.6": gamma(1.6),
    "lighter (1.15, clipped)": brightness(1.15), "mirrored": ImageOps.mirror,
    "bars at top and bottom": bars(0.1, "black"), "cropped by 2 %": cropped(0.02), "cropped by 5 %": cropped(0.05),
    "cropped by 20 %": cropped(0.2),
}  # fmt: skip
BLURS: dict[str, Damage] = {
    "unchanged": unchanged, "noise of 10 levels": noise(10), "JPEG 30": jpeg(30), "blur of 1 px": blur(1),
    "blur of 1.5 px": blur(1.5), "blur of 2 px": blur(2), "blur of 3 px": blur(3), "blur of 4 px": blur(4),
    "blur of 12 px": blur(12),
    "blur of 3 px, JPEG 75": chain(blur(3), jpeg(75)), "blur of 3 px, noise of 5": chain(blur(3), noise(5)),
    "upscaled 3 times": chain(resized(1 / 3), resized(3)),
}  # fmt: skip
BLOCKS: dict[str, Damage] = {
    "unchanged": unchanged, **{f"JPEG {quality}": jpeg(quality) for quality in (95, 90, 75, 60, 50, 40, 30, 20, 10)},
    "JPEG 30, cropped": chain(jpeg(30), lambda p: p.crop((3, 5, p.width, p.height))),
    "JPEG 30, then JPEG 90": chain(jpeg(30), jpeg(90)), "JPEG 30, then resized to 80 %": chain(jpeg(30), resized(0.8)),
}  # fmt: skip
BORDERS: dict[str, Damage] = {
    "unchanged": unchanged, "black bars of 8 %": bars(0.08, "black"), "black bars of 2 %": bars(0.02, "black"),
    "black bars of 8 %, JPEG 40": chain(bars(0.08, "black"), jpeg(40)), "white bars of 8 %": bars(0.08, "white"),
    "bars of 12 % at the sides": bars(0.12, "black", sides=True),
    "black frame of 3 %": lambda image: ImageOps.expand(image, image.width * 3 // 100, "black"),
}  # fmt: skip
EXPOSURES: dict[str, Damage] = {
    "unchanged": unchanged, "10 % brightness": brightness(0.1), "20 % brightness": brightness(0.2),
    "noise only": chain(brightness(0), noise(2)), "single color": brightness(0),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--every", type=int, default=1, help="use only every n-th image")
    args = parser.parse_args()
    sets = {}
    for entry in args.sets:
        name, _, folder = entry.rpartition("=")
        paths = [path for path in sorted(Path(folder).iterdir()) if path.suffix.lower() in SUFFIXES][:: args.every]
        sets[name or Path(folder).name] = [reduced(read_rgb(path), args.side) for path in paths]
    columns = [f"{name} ({len(images)})" for name, images in sets.items()]

    table(
        "Duplicates: modified copies that are detected",
        columns,
        [
            (
                label,
                [
                    percentage(
                        [
                            is_duplicate(original, likeness_of(without_bars(damage(image))))
                            for image, original in zip(images, map(likeness_of, images), strict=True)
                        ]
                    )
                    for images in sets.values()
                ],
            )
            for label, damage in COPIES.items()
        ]
        + [("pairs of different images reported as duplicates", [duplicate_pairs(images) for images in sets.values()])],
    )
    for title, damages, detects in (
        ("Blur", BLURS, lambda p: edge_blur(np.asarray(p.convert("L"))) > SOFT_PX),
        (
            "JPEG artifacts, without the file's quantization tables",
            BLOCKS,
            lambda p: block_steps(np.asarray(p.convert("L"))) >= HIGH_STEPS,
        ),
        ("Letterbox bars and frames", BORDERS, lambda p: bool(borders_of(np.asarray(p)))),
        ("A single color, almost black or almost white", EXPOSURES, is_badly_exposed),
    ):
        table(
            title,
            columns,
            [
                (label, [percentage([detects(damage(image)) for image in images]) for images in sets.values()])
                for label, damage in damages.items()
            ],
        )
    table("A watermark in the corner, in random sets of 12 images", columns, [
        (label, [detected_marks(images, damage, part) for images in sets.values()])
        for label, damage, part in (
            ("unchanged", unchanged, 1.0), ("black, opaque", watermarked(255, (0, 0, 0)), 1.0),
            ("black, half opaque", watermarked(128, (0, 0, 0)), 1.0),
            ("white, half opaque", watermarked(128, (255, 255, 255)), 1.0),
            ("black, in three of four images", watermarked(255, (0, 0, 0)), 0.75),
        )
    ])  # fmt: skip


def reduced(image: Image.Image, side_px: int) -> Image.Image:
    scale = side_px / (image.width * image.height) ** 0.5
    return resized(scale)(image) if scale < 1 else image


def is_duplicate(one: Likeness, other: Likeness) -> bool:
    return bool(same_picture([one, other]))


def without_bars(image: Image.Image) -> Image.Image:
    """Remove bars and frames, as `scumble check` does before it compares images."""
    bars = borders_of(np.asarray(image))
    return image.crop((bars.left, bars.top, image.width - bars.right, image.height - bars.bottom))


def duplicate_pairs(images: list[Image.Image]) -> str:
    count = sum(len(group) - 1 for group in same_picture([likeness_of(image) for image in images]))
    return f"{count} of {len(images) * (len(images) - 1) // 2:,}"


def is_badly_exposed(image: Image.Image) -> bool:
    exposure = exposure_of(image)
    return exposure.is_empty or exposure.lightest < DARK or exposure.darkest > LIGHT


def detected_marks(images: list[Image.Image], damage: Damage, part: float, size: int = 12, times: int = 40) -> str:
    if len(images) < size:
        return "too few"
    generator = random.Random(0)
    clean, damaged = [corners_of(one) for one in images], [corners_of(damage(one)) for one in images]
    found = 0
    for _ in range(times):
        sample = generator.sample(range(len(images)), size)
        found += bool(stamps_in([(damaged if n < part * size else clean)[index] for n, index in enumerate(sample)]))
    return f"{found / times:.0%}"


def percentage(found: list[bool]) -> str:
    return f"{sum(found) / len(found):.0%}"


def table(title: str, columns: list[str], rows: list[tuple[str, list[str]]]) -> None:
    print(f"\n## {title}\n\n| damage | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for label, cells in rows:
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
