"""The check-up as one page: no file beside it, no network, light and dark.

Everything that comes from files (names, captions) is escaped by the template engine, and the page forbids itself to
load anything.
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
SHOWN = 500  # pictures on a page, those with findings first: about 15 MB
NAMED = 24  # pictures named at a finding
SHAPE_PX = 26  # side of a square bucket as it is drawn
HIDDEN = (255, 40, 70, 140)  # tint of what a mask hides


@dataclass(frozen=True)
class Frame:
    """A crop over the whole picture, in percent of its sides; `whole` where next to nothing is cut off."""

    left: float
    top: float
    width: float
    height: float
    whole: bool


@dataclass(frozen=True)
class TextPart:
    """Of a caption: plain, the trigger, or what the base does not hear ("lost")."""

    text: str
    kind: str = "plain"


def page(done: Checkup, name: str, base: str, trigger: str) -> str:
    """The HTML of the page."""
    shown = shown_of(done)
    numbers = {str(look.path): number for number, look in shown}
    told = {str(look.path): done.of(str(look.path)) for _, look in shown}
    pictures = [
        _picture(number, look, told[str(look.path)], done.caption_texts[number], trigger) for number, look in shown
    ]
    environment = Environment(autoescape=True, trim_blocks=True)
    some = f", {len(shown)} of them shown, first those with findings" if len(shown) < len(done.measures) else ""
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=name, verdict=verdict(done), tone=_worst(done.findings) if done.findings else "good",
        facts=_facts(done, base), shapes=_shapes(done), findings=[_finding(one, numbers) for one in done.findings],
        heading=f"{counted(len(done.measures), 'picture')}{some}", pictures=pictures,
        dashes=any(len(picture["frames"]) > 1 for picture in pictures),
        masks=any(picture["mask"] for picture in pictures),
        lost=any(part.kind == "lost" for picture in pictures for part in picture["caption"]),
    )  # fmt: skip


def shown_of(done: Checkup, most: int = SHOWN) -> list[tuple[int, ImageMeasures]]:
    """The pictures that are shown, with their places in the set: all, or those of the rarest findings."""
    numbered = list(enumerate(done.measures))
    if len(numbered) <= most:
        return numbered
    rarest: dict[str, int] = {}  # what few pictures have is shown before what all have
    for finding in done.findings:
        if finding.severity != "note":
            for path in finding.details:
                rarest[path] = min(rarest.get(path, len(numbered)), len(finding.details))
    first = sorted(numbered, key=lambda one: (rarest.get(str(one[1].path), len(numbered) + 1), one[0]))
    return sorted(first[:most])


def frame_of(crop: Crop) -> Frame:
    """Where a crop lies on the picture as it is, which is mirrored afterwards where it is."""
    return Frame(
        left=round(100 * crop.left / crop.resized.width, 2), top=round(100 * crop.top / crop.resized.height, 2),
        width=round(100 * crop.target.width / crop.resized.width, 2),
        height=round(100 * crop.target.height / crop.resized.height, 2), whole=crop.cut < 0.01,
    )  # fmt: skip


def frames_of(crops: Sequence[Crop]) -> list[Frame]:
    """Each place once: a mirrored crop is the same place."""
    return list(dict.fromkeys(map(frame_of, crops)))


def tint_of(thumb: Thumb) -> Image.Image | None:
    """What a mask hides, as a red film to lay over the small picture."""
    if thumb.mask is None:
        return None
    mask = Image.open(io.BytesIO(thumb.mask))
    film = Image.new("RGBA", mask.size, HIDDEN)
    film.putalpha(mask.point([HIDDEN[3] * (255 - level) // 255 for level in range(256)]))
    return film


def _picture(
    number: int, look: ImageMeasures, findings: Sequence[Finding], heard: tuple[str, str], trigger: str
) -> dict:
    thumb = look.thumb or thumb_of(look.subject.example)
    film = tint_of(thumb)
    tone = _worst(findings) if findings else "good"
    return {
        "number": number, "name": look.path.name, "size": str(look.size).replace("x", " × "),
        "aspect": round(look.size.width / look.size.height, 4), "image": _data("jpeg", thumb.jpeg),
        "mask": _data("png", _png(film)) if film else "", "frames": frames_of(look.subject.crops),
        "caption": text_parts(*heard, trigger), "tone": "good" if tone == "note" else tone,
        "told": [{"severity": one.severity, "text": one.details[str(look.path)]} for one in findings],
    }  # fmt: skip


def text_parts(kept: str, lost: str, trigger: str) -> list[TextPart]:
    """A caption with its trigger and its lost end marked."""
    parts = [TextPart(kept)] if kept else []
    at = kept.lower().find(trigger.lower()) if trigger else -1
    if at >= 0:
        end = at + len(trigger)
        parts = [
            part for part in (TextPart(kept[:at]), TextPart(kept[at:end], "trigger"), TextPart(kept[end:])) if part.text
        ]
    return [*parts, TextPart(" "), TextPart(lost, "lost")] if lost else parts


def _finding(finding: Finding, numbers: dict[str, int]) -> dict:
    is_beside = finding.check in OF_FILES
    links = [{"number": numbers.get(path), "name": Path(path).name} for path in list(finding.details)[:NAMED]]
    more = len(finding.details) - len(links)
    return {
        "severity": finding.severity, "what": _sentence(finding.what), "why": _sentence(finding.why),
        "cure": finding.cure.replace("`", ""), "links": links,
        "reasons": list(finding.details.items()) if is_beside else [],
        "more": f" and {more} more" if more and not is_beside else "",
    }  # fmt: skip


def _facts(done: Checkup, base: str) -> list[tuple[str, str]]:
    facts = done.facts
    sizes = facts.smallest if facts.smallest == facts.largest else f"{facts.smallest} to {facts.largest}"
    captions = "all have one" if facts.captions == facts.images else f"{facts.captions} of {facts.images}"
    told = [
        ("Pictures", str(facts.images)), ("Captions", captions), ("Sizes", sizes.replace("x", " × ")),
        ("Variety", facts.variety), ("Base", base),
    ]  # fmt: skip
    return (
        [*told, ("Regularisation", counted(facts.regularization_images, "picture"))]
        if facts.regularization_images
        else told
    )


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


def _png(picture: Image.Image) -> bytes:
    written = io.BytesIO()
    picture.save(written, "PNG", optimize=True)
    return written.getvalue()
