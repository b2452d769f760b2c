"""Captioning a folder, from top to bottom: select the images, caption them, write the captions."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from scumble.configs.errors import Refused
from scumble.datasets.captions import tags_of, with_trigger
from scumble.datasets.reading.discovery import LeftOut

from .captioners.captioner import CAPTIONERS, make_captioner
from .captioners.picture import ImageFile
from .captioners.request import Existing, Request
from .captioners.wording import clean_answer
from .changes import Change, Origin, sha256
from .edits import drop_words
from .texts import CaptionEntry, check_writable, read_captions

Report = Callable[[int, int, Path, str], None]  # number done, total number, image, its caption
Action = Literal["caption", "keep", "keep manual"]


@dataclass
class CaptionOutcome:
    """The result for each image: `written` lists caption files; `kept`, `kept_manual` and `empty` list images.

    `kept_manual` captions were written by a person, and the captioner returned no text for the images in `empty`.
    `skipped` images or captions cannot be read. New captions lack the `lost_class_words`, which were captions before.
    """

    written: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    kept_manual: list[Path] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)
    skipped: list[LeftOut] = field(default_factory=list)
    lost_class_words: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ReadImage:
    """An image that was read: its fingerprint with the request, or the error if it cannot be read."""

    entry: CaptionEntry
    image: ImageFile
    request: str = ""
    error: str = ""


def caption_set(
    source: Path, request: Request, existing: Existing, overwrite: bool, batch: int, dry_run: bool, report: Report
) -> CaptionOutcome:
    """Caption the images of a folder. An interrupted run keeps its captions and does not generate them again."""
    # 1. Select the images: those without a caption, and those whose caption may be changed.
    info, outcome = CAPTIONERS[request.captioner], CaptionOutcome()
    entries, image_set = read_captions(source)
    check_writable(entries)
    outcome.skipped = [one for one in image_set.left_out if one.is_image]
    selected = []
    for entry in entries:
        action = action_for(entry, request, existing, overwrite)
        if action == "caption":
            selected.append(entry)
        else:
            (outcome.kept_manual if action == "keep manual" else outcome.kept).append(entry.image)
    if not selected:
        return outcome

    # 2. Caption them batch by batch, while the next batch is read.
    captioner = make_captioner(request)
    change = Change(f"caption with {request.captioner}" + (f" ({request.model})" if request.model else ""))
    done = 0
    for images in read_ahead(selected, request, batch or info.batch, info.reads_pixels):
        outcome.skipped += [LeftOut(one.image.path, one.error, True) for one in images if one.error]
        usable = [one for one in images if not one.error]
        answers = captioner.captions([one.image for one in usable]) if usable else []

        # 3. Write the captions, and record the previous content for undo.
        for one, answer in zip(usable, answers, strict=True):
            caption = combine(answer, one.entry, request, existing)
            if not caption:
                outcome.empty.append(one.image.path)
                continue
            if not dry_run:
                adds = existing in ("append", "prepend", "line")
                mixed = adds and one.entry.has_caption and not one.entry.is_generated
                change.write_text(one.entry.target_file, caption, Origin(one.request, mixed))
            outcome.written.append(one.entry.target_file)
            class_words = one.entry.example.words
            if one.entry.source == "class words" and class_words.lower() not in caption.lower():
                outcome.lost_class_words.append(class_words)
            report(done + len(images), len(selected), one.image.path, caption)
        done += len(images)
    outcome.lost_class_words = list(dict.fromkeys(outcome.lost_class_words))
    return outcome


def action_for(entry: CaptionEntry, request: Request, existing: Existing, overwrite: bool) -> Action:
    """Whether to caption an image or keep its caption; `keep manual` if a person wrote it."""
    if not entry.has_caption:
        return "caption"
    if existing == "keep":
        return "keep"
    if entry.origin and entry.origin.request == fingerprint(entry.image, request):
        return "keep"  # the same request wrote this caption before, for example in an interrupted run
    if existing == "replace" and not (entry.is_generated or overwrite):
        return "keep manual"
    return "caption"


def fingerprint(image: Path, request: Request) -> str:
    """Hash of the request and of the captioner's input: the bytes of the image file, or its name."""
    if not CAPTIONERS[request.captioner].reads_pixels:
        return request.fingerprint(image.name.encode())
    return request.fingerprint(sha256(image.read_bytes()).encode())


def read_ahead(
    entries: Sequence[CaptionEntry], request: Request, batch: int, reads_pixels: bool
) -> Iterator[list[ReadImage]]:
    """The images in batches, decoded one batch ahead."""
    with ThreadPoolExecutor(max_workers=min(batch, 4)) as pool:
        ahead: list[Future[ReadImage]] = []
        for start in range(0, len(entries), batch):
            jobs = [pool.submit(_read, entry, request, reads_pixels) for entry in entries[start : start + batch]]
            current, ahead = ahead, jobs
            if current:
                yield [future.result() for future in current]
        yield [future.result() for future in ahead]


def _read(entry: CaptionEntry, request: Request, reads_pixels: bool) -> ReadImage:
    image = ImageFile(entry.image)
    try:
        if reads_pixels:
            image.pixels.load()
        return ReadImage(entry, image, fingerprint(entry.image, request))
    except (Refused, OSError) as error:
        return ReadImage(entry, image, error=str(error).removeprefix(str(entry.image)).lstrip(": "))


def combine(answer: str, entry: CaptionEntry, request: Request, existing: Existing) -> str:
    """The text to write for an image, one caption per line; empty if the captioner returned no usable text."""
    is_tags = CAPTIONERS[request.captioner].returns_tags
    text = drop_words(" ".join(answer.split()) if is_tags else clean_answer(answer, request.subject), request.drop)
    if not text:
        return ""
    lines = list(entry.lines) if entry.has_caption else []
    if not lines or existing in ("replace", "keep"):
        lines, index = [text], 0
    elif existing == "line":
        lines, index = [*lines, text], len(lines)
    elif existing == "append":
        index = len(lines) - 1
        lines[index] = join_captions(lines[index], text, is_tags)
    else:
        lines[0], index = join_captions(text, lines[0], is_tags), 0
    if request.trigger and request.trigger_position != "none":
        lines[index] = with_trigger(lines[index], request.trigger, request.trigger_position)
    return "\n".join(lines)


def join_captions(first: str, second: str, is_tags: bool) -> str:
    """Join two captions: sentences with a space, tags with a comma and without repetition."""
    if is_tags:
        present = {tag.lower() for tag in tags_of(first)}
        second = ", ".join(tag for tag in tags_of(second) if tag.lower() not in present)
    if not second:
        return first
    return f"{first} {second}" if first.endswith((".", "!", "?")) else f"{first.rstrip(', ')}, {second}"
