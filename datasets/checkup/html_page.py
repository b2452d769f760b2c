"""Renders the check-up as a single HTML page: no other files, no network, light and dark mode.

The template engine escapes everything that comes from files (names, captions), and a content security policy prevents
the page from loading anything.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment
from PIL import Image

from scumble.configs.words import counted

from ..reading.images import Crop
from .checkup import OF_FILES, SEVERITIES, Checkup, Finding, verdict
from .measure import ImageMeasures, Thumb, thumb_of

TEMPLATE = Path(__file__).with_name("page.html")
SHOWN = 500  # images on a page, those with findings first: about 15 MB
NAMED = 24  # images linked in a finding
SHAPE_PX = 26  # side of a square bucket in the drawing
HIDDEN = (255, 40, 70, 140)  # tint of masked-out areas


@dataclass(frozen=True)
class Frame:
    """A crop as percentages of the image sides; `whole` if hardly anything is cropped off."""

    left: float
    top: float
    width: float
    height: float
    whole: bool


@dataclass(frozen=True)
class TextPart:
    """A part of a caption. Its `kind` is "plain", "trigger", or "lost" beyond the token limit."""

    text: str
    kind: str = "plain"


def page(done: Checkup, name: str, base: str, trigger: str) -> str:
    """Return the HTML of the page."""
    shown = shown_of(done)
    numbers = {str(measured.path): number for number, measured in shown}
    findings = {str(measured.path): done.findings_for(str(measured.path)) for _, measured in shown}
    images = [
        _image(number, measured, findings[str(measured.path)], done.caption_texts[number], trigger)
        for number, measured in shown
    ]
    environment = Environment(autoescape=True, trim_blocks=True)
    some = f" ({len(shown)} shown, those with rare findings first)" if len(shown) < len(done.measures) else ""
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=name, verdict=verdict(done), tone=_worst(done.findings) if done.findings else "good",
        facts=_facts(done, base), shapes=_shapes(done), findings=[_finding(one, numbers) for one in done.findings],
        heading=f"{counted(len(done.measures), 'image')}{some}", images=images,
        dashes=any(len(image["frames"]) > 1 for image in images),
        masks=any(image["mask"] for image in images),
        lost=any(part.kind == "lost" for image in images for part in image["caption"]),
    )  # fmt: skip


def shown_of(done: Checkup, limit: int = SHOWN) -> list[tuple[int, ImageMeasures]]:
    """Return the images to show, with their indices in the dataset: all, or those with the rarest findings."""
    numbered = list(enumerate(done.measures))
    if len(numbered) <= limit:
        return numbered
    rarest: dict[str, int] = {}  # findings on few images go before those on all
    for finding in done.findings:
        if finding.severity != "note":
            for path in finding.details:
                rarest[path] = min(rarest.get(path, len(numbered)), len(finding.details))
    first = sorted(numbered, key=lambda one: (rarest.get(str(one[1].path), len(numbered) + 1), one[0]))
    return sorted(first[:limit])


def frame_of(crop: Crop) -> Frame:
    """Return the position of a crop on the image before mirroring."""
    return Frame(
        left=round(100 * crop.left / crop.resized.width, 2), top=round(100 * crop.top / crop.resized.height, 2),
        width=round(100 * crop.target.width / crop.resized.width, 2),
        height=round(100 * crop.target.height / crop.resized.height, 2), whole=crop.cut < 0.01,
    )  # fmt: skip


def frames_of(crops: Sequence[Crop]) -> list[Frame]:
    """Return the distinct positions of the crops; a mirrored crop has the same position."""
    return list(dict.fromkeys(map(frame_of, crops)))


def tint_of(thumb: Thumb) -> Image.Image | None:
    """Return a red overlay for the thumbnail that marks the masked-out areas, or None without a mask."""
    if thumb.mask is None:
        return None
    mask = Image.open(io.BytesIO(thumb.mask))
    overlay = Image.new("RGBA", mask.size, HIDDEN)
    overlay.putalpha(mask.point([HIDDEN[3] * (255 - level) // 255 for level in range(256)]))
    return overlay


def _image(
    number: int, measured: ImageMeasures, findings: Sequence[Finding], caption_text: tuple[str, str], trigger: str
) -> dict:
    thumb = measured.thumb or thumb_of(measured.subject.example)
    overlay = tint_of(thumb)
    tone = _worst(findings) if findings else "good"
    return {
        "number": number, "name": measured.path.name, "size": str(measured.size).replace("x", " × "),
        "aspect": round(measured.size.width / measured.size.height, 4), "thumb": _data("jpeg", thumb.jpeg),
        "mask": _data("png", _png(overlay)) if overlay else "", "frames": frames_of(measured.subject.crops),
        "caption": text_parts(*caption_text, trigger), "tone": "good" if tone == "note" else tone,
        "findings": [{"severity": one.severity, "text": one.details[str(measured.path)]} for one in findings],
    }  # fmt: skip


def text_parts(kept: str, lost: str, trigger: str) -> list[TextPart]:
    """Split a caption into parts, with the trigger and the part beyond the token limit marked."""
    parts = [TextPart(kept)] if kept else []
    at = kept.lower().find(trigger.lower()) if trigger else -1
    if at >= 0:
        end = at + len(trigger)
        parts = [
            part for part in (TextPart(kept[:at]), TextPart(kept[at:end], "trigger"), TextPart(kept[end:])) if part.text
        ]
    return [*parts, TextPart(" "), TextPart(lost, "lost")] if lost else parts


def _finding(finding: Finding, numbers: dict[str, int]) -> dict:
    lists_files = finding.check in OF_FILES
    links = [{"number": numbers.get(path), "name": Path(path).name} for path in list(finding.details)[:NAMED]]
    more = len(finding.details) - len(links)
    return {
        "severity": finding.severity, "what": _sentence(finding.what), "why": _sentence(finding.why),
        "cure": finding.cure.replace("`", ""), "links": links,
        "reasons": list(finding.details.items()) if lists_files else [],
        "more": f" and {more} more" if more and not lists_files else "",
    }  # fmt: skip


def _facts(done: Checkup, base: str) -> list[tuple[str, str]]:
    facts = done.facts
    sizes = facts.smallest if facts.smallest == facts.largest else f"{facts.smallest} to {facts.largest}"
    captions = "all" if facts.captions == facts.images else f"{facts.captions} of {facts.images}"
    rows = [
        ("Images", str(facts.images)), ("Captions", captions), ("Sizes", sizes.replace("x", " × ")),
        ("Variety", facts.variety), ("Base model", base),
    ]  # fmt: skip
    prior = [("Regularization images", str(facts.regularization_images))] if facts.regularization_images else []
    return rows + prior


def _shapes(done: Checkup) -> list[dict]:
    shapes = []
    for use in done.facts.buckets:
        scale = SHAPE_PX / (use.width * use.height) ** 0.5
        label = f"{use.width} × {use.height}" + (f" ({use.images})" if len(done.facts.buckets) > 1 else "")
        shapes.append({"width": round(use.width * scale), "height": round(use.height * scale), "label": label})
    return shapes


def _worst(findings: Sequence[Finding]) -> str:
    return min((finding.severity for finding in findings), key=SEVERITIES.index)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _png(image: Image.Image) -> bytes:
    written = io.BytesIO()
    image.save(written, "PNG", optimize=True)
    return written.getvalue()
