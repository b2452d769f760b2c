"""Draws the check-up as one contact sheet: every image with its training crop, its caption and the findings."""

import io
from collections.abc import Sequence
from math import ceil, sqrt

from PIL import Image, ImageDraw, ImageOps

from ..fonts import Font, lettered
from .checkup import Checkup, Finding, verdict
from .html_page import Frame, frames_of, shown_of, tint_of
from .measure import ImageMeasures, thumb_of

SHOWN = 120
MAX_FINDINGS = 8
CELL_PX, GAP_PX, EDGE_PX, LINES = 280, 22, 44, 5
TITLE_PX, TEXT_PX, SMALL_PX = 40, 19, 16
PAPER, MAT, INK, SOFT = (246, 243, 238), (236, 230, 221), (43, 38, 34), (117, 105, 95)
TONES = {"serious": (179, 38, 30), "warning": (154, 98, 0), "note": (85, 103, 122), "good": (51, 112, 74)}
VEIL = 0.78  # how strongly cropped-off areas are faded


def sheet(done: Checkup, name: str, base: str) -> Image.Image:
    """Return the contact sheet. For a large dataset, it shows 120 images, those with findings first."""
    shown = shown_of(done, SHOWN)
    columns = max(3, min(8, ceil(sqrt(len(shown) * 1.5))))
    line_px = 24
    important = [finding for finding in done.findings if finding.severity != "note"]
    lines = [(finding.what, TONES[finding.severity]) for finding in important[:MAX_FINDINGS]]
    if len(important) > MAX_FINDINGS:
        lines.append((f"and {len(important) - MAX_FINDINGS} more on the page", TONES["note"]))
    top = EDGE_PX + 54 + 34 + 30 * len(lines) + 30
    cell_height = CELL_PX + LINES * line_px + GAP_PX
    width = 2 * EDGE_PX + columns * (CELL_PX + GAP_PX) - GAP_PX
    paper = Image.new("RGB", (width, top + ceil(len(shown) / columns) * cell_height + EDGE_PX - GAP_PX), PAPER)
    pen = ImageDraw.Draw(paper)
    _write(pen, (EDGE_PX, EDGE_PX - 8), name, TITLE_PX, INK, width - 2 * EDGE_PX)
    tone = important[0].severity if important else "good"
    _write(pen, (EDGE_PX, EDGE_PX + 46), _headline(done, base, len(shown)), TEXT_PX, TONES[tone], width - 2 * EDGE_PX)
    dot = _dot(12)
    for row, (line, color) in enumerate(lines):
        y = EDGE_PX + 92 + 30 * row
        paper.paste(color, (EDGE_PX, y + 4), dot)
        _write(pen, (EDGE_PX + 24, y), line, TEXT_PX, INK, width - 2 * EDGE_PX - 24)
    for position, (number, measured) in enumerate(shown):
        x = EDGE_PX + position % columns * (CELL_PX + GAP_PX)
        y = top + position // columns * cell_height
        findings = [one for one in done.findings_for(str(measured.path)) if one.severity != "note"]
        paper.paste(_cell(measured, findings), (x, y))
        _write_label(pen, measured, done.caption_texts[number], findings, (x, y + CELL_PX + 8))
    return paper


def fitted(text: str, font: Font, width_px: int) -> str:
    """Return the text on one line, truncated with … if it is too long."""
    if font.getlength(text) <= width_px:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle].rstrip() + "…") <= width_px else (low, middle - 1)
    return text[:low].rstrip() + "…"


def wrapped(text: str, font: Font, width_px: int, lines: int) -> list[str]:
    """Wrap the text between words into at most `lines` lines; the last one is truncated if it is too long."""
    found: list[str] = []
    words = text.split()
    while words and len(found) < lines - 1:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width_px:
            count += 1
        found.append(fitted(" ".join(words[:count]), font, width_px))
        words = words[count:]
    return [*found, fitted(" ".join(words), font, width_px)] if words else found


def _headline(done: Checkup, base: str, shown: int) -> str:
    count = f"{shown} of {len(done.measures)} images" if shown < len(done.measures) else f"{shown} images"
    return f"{verdict(done)}.  {count} for {base}, {done.facts.variety} variety"


def _cell(measured: ImageMeasures, findings: Sequence[Finding]) -> Image.Image:
    """Draw an image in a square, with cropped-off areas faded and a border in the color of the worst finding."""
    thumb = measured.thumb or thumb_of(measured.subject.example)
    image = Image.open(io.BytesIO(thumb.jpeg)).convert("RGB")
    overlay = tint_of(thumb)
    if overlay:
        image.paste(overlay, mask=overlay.getchannel("A"))
    image = ImageOps.contain(image, (CELL_PX - 20, CELL_PX - 20), Image.Resampling.LANCZOS)
    first, *others = frames_of(measured.subject.crops)
    if not first.whole and not others:
        box = _box(first, image)
        inner = image.crop(box)
        image = Image.blend(image, Image.new("RGB", image.size, MAT), VEIL)
        image.paste(inner, box[:2])
    pen = ImageDraw.Draw(image)
    for frame in (first, *others):
        if not frame.whole:
            left, top, right, bottom = _box(frame, image)
            pen.rectangle([left, top, right - 1, bottom - 1], outline=INK, width=1)
    cell = Image.new("RGB", (CELL_PX, CELL_PX), MAT)
    cell.paste(image, ((CELL_PX - image.width) // 2, (CELL_PX - image.height) // 2))
    if findings:
        tone = TONES[findings[0].severity]
        ImageDraw.Draw(cell).rectangle([0, 0, CELL_PX - 1, CELL_PX - 1], outline=tone, width=4)
    return cell


def _dot(side_px: int) -> Image.Image:
    """Return an antialiased disc as a mask."""
    large = Image.new("L", (8 * side_px, 8 * side_px))
    ImageDraw.Draw(large).ellipse([0, 0, 8 * side_px - 1, 8 * side_px - 1], 255)
    return large.resize((side_px, side_px), Image.Resampling.BOX)


def _box(frame: Frame, image: Image.Image) -> tuple[int, int, int, int]:
    left, top = round(frame.left * image.width / 100), round(frame.top * image.height / 100)
    right = round((frame.left + frame.width) * image.width / 100)
    return left, top, right, round((frame.top + frame.height) * image.height / 100)


def _write_label(
    pen: ImageDraw.ImageDraw,
    measured: ImageMeasures,
    caption_text: tuple[str, str],
    findings: Sequence[Finding],
    position: tuple[int, int],
) -> None:
    """Write file name, caption and findings below an image."""
    x, y = position
    size, size_font = lettered(str(measured.size), SMALL_PX)
    width = round(size_font.getlength(size))
    pen.text((x + CELL_PX - width, y), size, SOFT, size_font)
    _write(pen, position, measured.path.name, SMALL_PX, SOFT, CELL_PX - width - GAP_PX)
    room = max(1, LINES - 1 - min(2, len(findings)))
    caption, font = lettered(caption_text[0] or "no caption", TEXT_PX)
    lines = [(line, INK, TEXT_PX) for line in wrapped(caption, font, CELL_PX, min(2, room))]
    for finding in findings[:2]:
        lines.append((finding.details[str(measured.path)], TONES[finding.severity], SMALL_PX))
    for row, (line, color, text_px) in enumerate(lines[: LINES - 1], 1):
        _write(pen, (x, y + 23 * row), line, text_px, color, CELL_PX)


def _write(
    pen: ImageDraw.ImageDraw,
    position: tuple[int, int],
    text: str,
    size: int,
    color: tuple[int, int, int],
    width_px: int,
) -> None:
    """Write one line of text in a font that can draw it, truncated if it is too long."""
    shown, font = lettered(text, size)
    pen.text(position, fitted(shown, font, width_px), color, font)
