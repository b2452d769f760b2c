"""Labeled grids of images."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from scumble.configs.atomic import atomic_write
from scumble.datasets.fonts import Font, lettered

GAP_PX = 8
MAX_LABEL_LINES = 3  # of a prompt above its image
CELL_PX = range(128, 385)  # longer side of an image in a grid
TEXT_COLOR, BACKGROUND = (40, 40, 40), (255, 255, 255)


def cell(image: Image.Image) -> Image.Image:
    """Scale an image to a readable size for a grid: small images are enlarged by powers of 2, large ones reduced."""
    side = longer = max(image.size)
    while side < CELL_PX[0]:
        side *= 2
    side = min(side, CELL_PX[-1])
    if side == longer:
        return image
    size = (max(1, image.width * side // longer), max(1, image.height * side // longer))
    return image.resize(size, Image.Resampling.LANCZOS)


def grid(
    rows: Sequence[Sequence[Image.Image]], above: Sequence[Sequence[str]], left: Sequence[str] = ()
) -> Image.Image:
    """Draw rows of images with labels: `above` has one per image (an empty row has none), `left` has one per row."""
    width = max(image.width for row in rows for image in row)
    height = max(image.height for row in rows for image in row)
    text_px = max(11, width // 18)
    line_px = int(text_px * 1.7)
    names = [lettered(label, text_px) for label in left]
    margin = int(max((font.getlength(label) for label, font in names), default=0)) + (GAP_PX if left else 0)
    texts = [[wrapped(label, text_px, width) for label in labels] for labels in above]
    tops, end = [], GAP_PX
    for labels in texts:
        tops.append(end + line_px * max((len(lines) for lines, _ in labels), default=0))
        end = tops[-1] + height + GAP_PX
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (margin + columns * (width + GAP_PX) + GAP_PX, end), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, (row, labels, top) in enumerate(zip(rows, texts, tops, strict=True)):
        if left:
            name, font = names[number]
            draw.text((GAP_PX, top + height / 2), name, TEXT_COLOR, font, anchor="lm")
        for column, image in enumerate(row):
            x = margin + GAP_PX + column * (width + GAP_PX)
            sheet.paste(image, (x + (width - image.width) // 2, top + (height - image.height) // 2))
            if labels:
                lines, font = labels[column]
                for line, shown in enumerate(reversed(lines)):
                    draw.text((x + width / 2, top - line_px * (line + 0.5)), shown, TEXT_COLOR, font, anchor="mm")
    return sheet


def wrapped(label: str, text_px: int, width_px: int) -> tuple[list[str], Font]:
    """Wrap the label into at most MAX_LABEL_LINES lines, the last one shortened with …. Also returns the font."""
    shown, font = lettered(label, text_px)
    lines, words = [""], shown.split()
    for number, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width_px:
            lines[-1] = longer
        elif len(lines) < MAX_LABEL_LINES:
            lines.append(word)
        else:
            lines[-1] = " ".join([lines[-1], *words[number:]])
            break
    return [shortened(line, font, width_px) for line in lines], font


def shortened(label: str, font: Font, width_px: int) -> str:
    """Shorten the label with … to fit the width."""
    shown = label
    while len(shown) > 1 and font.getlength(shown) > width_px:
        shown = shown[:-2].rstrip() + "…"
    return shown


def write_png(image: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    """Write a PNG file atomically. Raises `Refused` (73) if it cannot be written."""
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
