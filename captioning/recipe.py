"""Captioning a folder, from top to bottom: which pictures, what is said of them, what is written where."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from scumble.configs.errors import Refused
from scumble.datasets.captions import tags_of, with_trigger
from scumble.datasets.reading.discovery import LeftOut

from .captioners.captioner import CAPTIONERS, make_captioner
from .captioners.picture import Picture
from .captioners.request import Existing, Request
from .captioners.wording import cleaned
from .changes import Change, Origin, hashed
from .edits import without
from .texts import Text, check_writable, read_texts

Tell = Callable[[int, int, Path, str], None]  # done, of how many, picture, its caption


@dataclass
class CaptionOutcome:
    """What became of the pictures: `written` by name of the caption file, the rest by name of the picture."""

    written: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    by_hand: list[Path] = field(default_factory=list)
    silent: list[Path] = field(default_factory=list)
    lost: list[LeftOut] = field(default_factory=list)
    unheard: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ReadImage:
    """A picture that was looked at: its fingerprint under the request, or why it cannot be read."""

    text: Text
    picture: Picture
    request: str = ""
    reason: str = ""


def caption_set(
    source: Path, request: Request, existing: Existing, overwrite: bool, batch: int, dry_run: bool, tell: Tell
) -> CaptionOutcome:
    """Caption the pictures of a folder. What is written so far stays when the run is cut, and is not made again."""
    # 1. Which pictures: those without a caption, and what the request lets touch.
    kind, outcome = CAPTIONERS[request.captioner], CaptionOutcome()
    texts, found = read_texts(source)
    check_writable(texts)
    outcome.lost = [one for one in found.left_out if one.is_image]
    wanted = []
    for text in texts:
        fate = fate_of(text, request, existing, overwrite)
        if fate == "make":
            wanted.append(text)
        else:
            (outcome.by_hand if fate == "by hand" else outcome.kept).append(text.picture)
    if not wanted:
        return outcome

    # 2. Say something of each, a batch at a time, the next one being read meanwhile.
    captioner = make_captioner(request)
    change = Change(f"caption by {request.captioner}" + (f" ({request.model})" if request.model else ""))
    done = 0
    for seen in read_ahead(wanted, request, batch or kind.batch, kind.sees):
        outcome.lost += [LeftOut(one.picture.path, one.reason, True) for one in seen if one.reason]
        usable = [one for one in seen if not one.reason]
        answers = captioner.captions([one.picture for one in usable]) if usable else []

        # 3. Write it where it belongs, with what was there kept for undo.
        for one, answer in zip(usable, answers, strict=True):
            caption = composed(answer, one.text, request, existing)
            if not caption:
                outcome.silent.append(one.picture.path)
                continue
            if not dry_run:
                mixed = existing in ("append", "prepend", "line") and one.text.is_caption and not one.text.is_ours
                change.write(one.text.file, caption, Origin(one.request, mixed))
            outcome.written.append(one.text.file)
            if one.text.source == "words" and one.text.example.words.lower() not in caption.lower():
                outcome.unheard.append(one.text.example.words)
            tell(done + len(seen), len(wanted), one.picture.path, caption)
        done += len(seen)
    outcome.unheard = list(dict.fromkeys(outcome.unheard))
    return outcome


def fate_of(text: Text, request: Request, existing: Existing, overwrite: bool) -> str:
    """`make_captioner`, `kept`, or `by hand`, which is kept because a person wrote it."""
    if not text.is_caption:
        return "make"
    if existing == "keep":
        return "kept"
    if text.origin and text.origin.request == fingerprint(text.picture, request):
        return "kept"  # this very caption was made before, by a run that was cut perhaps
    if existing == "replace" and not (text.is_ours or overwrite):
        return "by hand"
    return "make"


def fingerprint(picture: Path, request: Request) -> str:
    """Of the request and of all that the captioner goes by: the picture's bytes, or its name."""
    if not CAPTIONERS[request.captioner].sees:
        return request.fingerprint(picture.name.encode())
    return request.fingerprint(hashed(picture.read_bytes()).encode())


def read_ahead(texts: Sequence[Text], request: Request, batch: int, sees: bool) -> Iterator[list[ReadImage]]:
    """The pictures in batches, decoded one batch ahead."""
    with ThreadPoolExecutor(max_workers=min(batch, 4)) as pool:
        ahead: list[Future[ReadImage]] = []
        for start in range(0, len(texts), batch):
            now, ahead = ahead, [pool.submit(_look, text, request, sees) for text in texts[start : start + batch]]
            if now:
                yield [future.result() for future in now]
        yield [future.result() for future in ahead]


def _look(text: Text, request: Request, sees: bool) -> ReadImage:
    picture = Picture(text.picture)
    try:
        if sees:
            picture.pixels.load()
        return ReadImage(text, picture, fingerprint(text.picture, request))
    except (Refused, OSError) as error:
        return ReadImage(text, picture, reason=str(error).removeprefix(f"{text.picture} "))


def composed(answer: str, text: Text, request: Request, existing: Existing) -> str:
    """What is written for a picture; nothing where the captioner said nothing. Lines stand below each other."""
    is_tags = CAPTIONERS[request.captioner].says_tags
    words = without(" ".join(answer.split()) if is_tags else cleaned(answer, request.subject), request.drop)
    if not words:
        return ""
    lines = list(text.lines) if text.is_caption else []
    if not lines or existing in ("replace", "keep"):
        lines, at = [words], 0
    elif existing == "line":
        lines, at = [*lines, words], len(lines)
    elif existing == "append":
        at = len(lines) - 1
        lines[at] = joined(lines[at], words, is_tags)
    else:
        lines[0], at = joined(words, lines[0], is_tags), 0
    if request.trigger and request.trigger_position != "none":
        lines[at] = with_trigger(lines[at], request.trigger, request.trigger_position)
    return "\n".join(lines)


def joined(first: str, second: str, is_tags: bool) -> str:
    """Two captions as one: sentences after each other, tags behind commas, each once."""
    if is_tags:
        has = {tag.lower() for tag in tags_of(first)}
        second = ", ".join(tag for tag in tags_of(second) if tag.lower() not in has)
    if not second:
        return first
    return f"{first} {second}" if first.endswith((".", "!", "?")) else f"{first.rstrip(', ')}, {second}"
