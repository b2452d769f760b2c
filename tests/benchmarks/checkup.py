"""Detection and false alarms of the check-up's measures on damaged copies of good pictures (Markdown).

    python tests/benchmarks/checkup.py NAME=FOLDER… [--side 512] [--every 1]

Each picture is brought to at most SIDE² pixels, as training would, and damaged in known ways. A row gives, for each
set, the share of the copies in which the check-up's threshold is passed; rows named "as it is" are false alarms.
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


def as_it_is(picture: Image.Image) -> Image.Image:
    return picture


def jpeg(quality: int) -> Damage:
    def damage(picture: Image.Image) -> Image.Image:
        written = io.BytesIO()
        picture.save(written, "JPEG", quality=quality)
        return Image.open(written).convert("RGB")

    return damage


def blur(sigma_px: float) -> Damage:
    return lambda picture: picture.filter(ImageFilter.GaussianBlur(sigma_px))


def noise(levels: float) -> Damage:
    def damage(picture: Image.Image) -> Image.Image:
        pixels = np.asarray(picture) + NOISE.normal(0, levels, (picture.height, picture.width, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    return damage


def resized(scale: float) -> Damage:
    def damage(picture: Image.Image) -> Image.Image:
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        return picture.resize(size, Image.Resampling.LANCZOS)

    return damage


def cropped(share: float) -> Damage:
    """Off-centre, so that what is left does not lie where it lay."""

    def damage(picture: Image.Image) -> Image.Image:
        wide, high = picture.size
        left, top = 0.6 * share * wide, 0.3 * share * high
        return picture.crop(
            (round(left), round(top), round(left + wide - share * wide), round(top + high * (1 - share)))
        )

    return damage


def bars(share: float, colour: str, sides: bool = False) -> Damage:
    def damage(picture: Image.Image) -> Image.Image:
        thick = round((picture.width if sides else picture.height) * share)
        return ImageOps.expand(picture, (thick, 0) if sides else (0, thick), colour)

    return damage


def gamma(power: float) -> Damage:
    return lambda picture: picture.point([round(255 * (level / 255) ** power) for level in range(256)] * 3)


def light(factor: float) -> Damage:
    return lambda picture: ImageEnhance.Brightness(picture).enhance(factor)


def marked(opacity: int, colour: tuple[int, int, int]) -> Damage:
    def damage(picture: Image.Image) -> Image.Image:
        size = max(10, picture.width // 24)
        font, text = ImageFont.load_default(size), "© studio mira"
        place = picture.width * 0.97 - font.getlength(text), picture.height - 1.6 * size
        layer = Image.new("RGBA", picture.size, (0, 0, 0, 0))
        ImageDraw.Draw(layer).text(place, text, (*colour, opacity), font)
        return Image.alpha_composite(picture.convert("RGBA"), layer).convert("RGB")

    return damage


def chain(*damages: Damage) -> Damage:
    def damage(picture: Image.Image) -> Image.Image:
        for one in damages:
            picture = one(picture)
        return picture

    return damage


COPIES: dict[str, Damage] = {
    "half the size": resized(0.5), "an eighth of the size": resized(0.125), "JPEG 10": jpeg(10), "JPEG 50": jpeg(50),
    "noise of 25 levels": noise(25), "blur of 2 px": blur(2), "darker (0.6)": light(0.6), "gamma 1.6": gamma(1.6),
    "lighter (1.15, clipped)": light(1.15), "mirrored": ImageOps.mirror, "bars above and below": bars(0.1, "black"),
    "cropped by 2 %": cropped(0.02), "cropped by 5 %": cropped(0.05), "cropped by 20 %": cropped(0.2),
}  # fmt: skip
BLURS: dict[str, Damage] = {
    "as it is": as_it_is, "noise of 10 levels": noise(10), "JPEG 30": jpeg(30), "blur of 1 px": blur(1),
    "blur of 1.5 px": blur(1.5), "blur of 2 px": blur(2), "blur of 3 px": blur(3), "blur of 4 px": blur(4),
    "blur of 12 px": blur(12),
    "blur of 3 px, JPEG 75": chain(blur(3), jpeg(75)), "blur of 3 px, noise of 5": chain(blur(3), noise(5)),
    "enlarged 3 times": chain(resized(1 / 3), resized(3)),
}  # fmt: skip
BLOCKS: dict[str, Damage] = {
    "as it is": as_it_is, **{f"JPEG {quality}": jpeg(quality) for quality in (95, 90, 75, 60, 50, 40, 30, 20, 10)},
    "JPEG 30, cropped": chain(jpeg(30), lambda p: p.crop((3, 5, p.width, p.height))),
    "JPEG 30, then JPEG 90": chain(jpeg(30), jpeg(90)), "JPEG 30, then four fifths": chain(jpeg(30), resized(0.8)),
}  # fmt: skip
BORDERS: dict[str, Damage] = {
    "as it is": as_it_is, "black bars of 8 %": bars(0.08, "black"), "black bars of 2 %": bars(0.02, "black"),
    "black bars of 8 %, JPEG 40": chain(bars(0.08, "black"), jpeg(40)), "white bars of 8 %": bars(0.08, "white"),
    "bars at the sides of 12 %": bars(0.12, "black", sides=True),
    "black frame of 3 %": lambda picture: ImageOps.expand(picture, picture.width * 3 // 100, "black"),
}  # fmt: skip
LIGHTS: dict[str, Damage] = {
    "as it is": as_it_is, "a tenth of the light": light(0.1), "a fifth of the light": light(0.2),
    "noise alone": chain(light(0), noise(2)), "one colour": light(0),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--every", type=int, default=1, help="take each n-th picture")
    asked = parser.parse_args()
    sets = {}
    for entry in asked.sets:
        name, _, folder = entry.rpartition("=")
        paths = [path for path in sorted(Path(folder).iterdir()) if path.suffix.lower() in SUFFIXES][:: asked.every]
        sets[name or Path(folder).name] = [brought(read_rgb(path), asked.side) for path in paths]
    head = [f"{name} ({len(pictures)})" for name, pictures in sets.items()]

    table(
        "The same picture: copies that are found",
        head,
        [
            (
                label,
                [
                    share(
                        [
                            found_again(copy, likeness_of(without_bars(damage(picture))))
                            for picture, copy in zip(pictures, map(likeness_of, pictures), strict=True)
                        ]
                    )
                    for pictures in sets.values()
                ],
            )
            for label, damage in COPIES.items()
        ]
        + [("pairs of different pictures taken for one", [twins(pictures) for pictures in sets.values()])],
    )
    for title, damages, finds in (
        ("Blurred", BLURS, lambda p: edge_blur(np.asarray(p.convert("L"))) > SOFT_PX),
        (
            "JPEG blocks, without the file's tables",
            BLOCKS,
            lambda p: block_steps(np.asarray(p.convert("L"))) >= HIGH_STEPS,
        ),
        ("Bars and frames", BORDERS, lambda p: bool(borders_of(np.asarray(p)))),
        ("One colour, almost black or white", LIGHTS, dull),
    ):
        table(
            title,
            head,
            [
                (label, [share([finds(damage(picture)) for picture in pictures]) for pictures in sets.values()])
                for label, damage in damages.items()
            ],
        )
    table("A mark in the corner, in drawn sets of 12 pictures", head, [
        (label, [marks(pictures, damage, part) for pictures in sets.values()])
        for label, damage, part in (
            ("as they are", as_it_is, 1.0), ("black, opaque", marked(255, (0, 0, 0)), 1.0),
            ("black, half opaque", marked(128, (0, 0, 0)), 1.0),
            ("white, half opaque", marked(128, (255, 255, 255)), 1.0),
            ("black, in three of four", marked(255, (0, 0, 0)), 0.75),
        )
    ])  # fmt: skip


def brought(picture: Image.Image, side_px: int) -> Image.Image:
    scale = side_px / (picture.width * picture.height) ** 0.5
    return resized(scale)(picture) if scale < 1 else picture


def found_again(one: Likeness, other: Likeness) -> bool:
    return bool(same_picture([one, other]))


def without_bars(picture: Image.Image) -> Image.Image:
    """As the check-up compares pictures: without bars and frames."""
    bars = borders_of(np.asarray(picture))
    return picture.crop((bars.left, bars.top, picture.width - bars.right, picture.height - bars.bottom))


def twins(pictures: list[Image.Image]) -> str:
    count = sum(len(group) - 1 for group in same_picture([likeness_of(picture) for picture in pictures]))
    return f"{count} of {len(pictures) * (len(pictures) - 1) // 2:,}"


def dull(picture: Image.Image) -> bool:
    seen = exposure_of(picture)
    return seen.is_empty or seen.lightest < DARK or seen.darkest > LIGHT


def marks(pictures: list[Image.Image], damage: Damage, part: float, size: int = 12, times: int = 40) -> str:
    if len(pictures) < size:
        return "too few"
    draw = random.Random(0)
    clean, dirty = [corners_of(one) for one in pictures], [corners_of(damage(one)) for one in pictures]
    found = 0
    for _ in range(times):
        drawn = draw.sample(range(len(pictures)), size)
        found += bool(stamps_in([(dirty if n < part * size else clean)[index] for n, index in enumerate(drawn)]))
    return f"{found / times:.0%}"


def share(found: list[bool]) -> str:
    return f"{sum(found) / len(found):.0%}"


def table(title: str, head: list[str], rows: list[tuple[str, list[str]]]) -> None:
    print(f"\n## {title}\n\n| damage | {' | '.join(head)} |\n|---|{'---|' * len(head)}")
    for label, cells in rows:
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
