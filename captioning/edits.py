"""Edits of one caption: pure functions from text to text. A caption is tags between commas, or sentences."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from scumble.configs.errors import Refused
from scumble.datasets.captions import tags_of

Edit = Callable[[str], str]
End = Literal["front", "end"]


def pattern(text: str, regex: bool, ignore_case: bool, flag: str) -> re.Pattern[str]:
    """What `text` looks for: a regex, or else these very words, not inside longer ones. Refuses a broken regex."""
    flags = re.IGNORECASE if ignore_case else 0
    if not regex:
        before, after = (r"(?<!\w)" if text[:1].isalnum() else "", r"(?!\w)" if text[-1:].isalnum() else "")
        return re.compile(before + re.escape(text) + after, flags)
    try:
        return re.compile(text, flags)
    except re.error as error:
        raise Refused(f"{flag} {text}: not a regex ({error})") from None


def replacing(old: re.Pattern[str], new: str, regex: bool) -> Edit:
    """Every place that `old` finds becomes `new`; with a regex, `\\1` in it is the first group."""
    put = new if regex else new.replace("\\", r"\\")
    try:
        old.sub(put, "")  # a group that there is not is refused before any file is read
    except (re.error, IndexError) as error:
        raise Refused(f"replace by {new}: {error}") from None

    def edit(caption: str) -> str:
        changed = old.sub(put, caption)
        return caption if changed == caption else tidy(changed)

    return edit


def adding(words: str, end: End) -> Edit:
    """Put words at one end, unless the caption has them, whatever their case."""
    there = pattern(words, False, True, "add")

    def edit(caption: str) -> str:
        if there.search(caption):
            return caption
        return ", ".join(filter(None, (words, caption) if end == "front" else (tidy(caption), words)))

    return edit


def removing(tags: Sequence[str], regex: bool) -> Edit:
    """Take out whole tags, whatever their case; with a regex, those that it matches from end to end."""
    found = [pattern(tag, True, True, "remove") if regex else re.compile(re.escape(tag), re.I) for tag in tags]

    def edit(caption: str) -> str:
        parts = tags_of(caption)
        left = [part for part in parts if not any(one.fullmatch(part) for one in found)]
        return caption if left == parts else ", ".join(left)

    return edit


def deduped(caption: str) -> str:
    """Each tag once, where it stood first; case does not count."""
    parts = tags_of(caption)
    first: dict[str, str] = {}
    for part in parts:
        first.setdefault(part.lower(), part)
    return caption if len(first) == len(parts) else ", ".join(first.values())


def sorting(counts: Counter[str] | None, keep_tags: int) -> Edit:
    """Tags behind the kept ones in the order of the alphabet, or the most frequent of the set first."""

    def place(tag: str) -> tuple[int, str]:
        return (-counts[tag.lower()] if counts else 0, tag.lower())

    def edit(caption: str) -> str:
        parts = tags_of(caption)
        ordered = parts[:keep_tags] + sorted(parts[keep_tags:], key=place)
        return caption if ordered == parts else ", ".join(ordered)

    return edit


def without(caption: str, words: Sequence[str]) -> str:
    """The caption without these words, whatever their case: whole tags, and whole words inside a sentence."""
    for one in words:
        caption = removing([one], regex=False)(caption)
        caption = replacing(pattern(one, False, True, "--drop"), "", regex=False)(caption)
    return caption


def tidy(caption: str) -> str:
    """Without the empty tags, doubled spaces and spaces before commas that taking words out leaves."""
    caption = re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"\s+", " ", caption))
    caption = re.sub(r"(?:,\s*)+(?=[,.;:!?])", "", caption)
    return caption.strip(" ,")


def tag_counts(captions: Sequence[str]) -> Counter[str]:
    """Tag, in small letters -> number of captions that have it."""
    return Counter(tag for caption in captions for tag in {tag.lower() for tag in tags_of(caption)})


def word_counts(captions: Sequence[str]) -> Counter[str]:
    """Word, in small letters -> number of captions that have it."""
    return Counter(word for caption in captions for word in set(re.findall(r"[^\W_][\w'-]*", caption.lower())))
