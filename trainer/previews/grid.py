"""Labelled grids of images."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from scumble.configs.atomic import atomic_write
from scumble.datasets.fonts import Font, lettered

GAP_PX = 8
LABEL_LINES = 3  # of a prompt over its picture, at most
CELL_PX = range(128, 385)  # longer side of a picture on a grid
INK, PAPER = (40, 40, 40), (255, 255, 255)


def cell(picture: Image.Image) -> Image.Image:
    """The picture at a size that can be looked at on a grid: small ones doubled, large ones reduced."""
    side = longer = max(picture.size)
    while side < CELL_PX[0]:
        side *= 2
    side = min(side, CELL_PX[-1])
    if side == longer:
        return picture
    size = (max(1, picture.width * side // longer), max(1, picture.height * side // longer))
    return picture.resize(size, Image.Resampling.LANCZOS)


def grid(
    rows: Sequence[Sequence[Image.Image]], above: Sequence[Sequence[str]], left: Sequence[str] = ()
) -> Image.Image:
    """Rows of pictures, a label over each (none where `above` has an empty row) and one at the left of each row."""
    width = max(picture.width for row in rows for picture in row)
    height = max(picture.height for row in rows for picture in row)
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
    sheet = Image.new("RGB", (margin + columns * (width + GAP_PX) + GAP_PX, end), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (row, labels, top) in enumerate(zip(rows, texts, tops, strict=True)):
        if left:
            name, font = names[number]
            pen.text((GAP_PX, top + height / 2), name, INK, font, anchor="lm")
        for column, picture in enumerate(row):
            x = margin + GAP_PX + column * (width + GAP_PX)
            sheet.paste(picture, (x + (width - picture.width) // 2, top + (height - picture.height) // 2))
            if labels:
                lines, font = labels[column]
                for line, shown in enumerate(reversed(lines)):
                    pen.text((x + width / 2, top - line_px * (line + 0.5)), shown, INK, font, anchor="mm")
    return sheet


def wrapped(label: str, text_px: int, width_px: int) -> tuple[list[str], Font]:
    """The label in as many lines as it needs, at most LABEL_LINES, the last of them cut with …; and their font."""
    shown, font = lettered(label, text_px)
    lines, words = [""], shown.split()
    for number, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width_px:
            lines[-1] = longer
        elif len(lines) < LABEL_LINES:
            lines.append(word)
        else:
            lines[-1] = " ".join([lines[-1], *words[number:]])
            break
    return [shortened(line, font, width_px) for line in lines], font


def shortened(label: str, font: Font, width_px: int) -> str:
    """The label, cut with … to fit."""
    shown = label
    while len(shown) > 1 and font.getlength(shown) > width_px:
        shown = shown[:-2].rstrip() + "…"
    return shown


def write_png(picture: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    """Write a PNG file atomically. Raises `Refused` (73) where it cannot be written."""
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)
