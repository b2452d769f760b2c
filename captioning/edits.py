"""Edits of one caption: pure functions from text to text. A caption is a list of comma-separated tags, or sentences."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from scumble.configs.errors import Refused
from scumble.datasets.captions import tags_of

Edit = Callable[[str], str]
Position = Literal["front", "end"]


def pattern(text: str, regex: bool, ignore_case: bool, flag: str) -> re.Pattern[str]:
    """Compile `text` as a regex, or as literal whole words. Raises `Refused` naming `flag` if the regex is invalid."""
    flags = re.IGNORECASE if ignore_case else 0
    if not regex:
        before, after = (r"(?<!\w)" if text[:1].isalnum() else "", r"(?!\w)" if text[-1:].isalnum() else "")
        return re.compile(before + re.escape(text) + after, flags)
    try:
        return re.compile(text, flags)
    except re.error as error:
        raise Refused(f"{flag} {text}: not a valid regex ({error})") from None


def replacing(old: re.Pattern[str], new: str, regex: bool) -> Edit:
    """An edit that replaces every match of `old` with `new`; with `regex`, `\\1` in `new` is the first group."""
    template = new if regex else new.replace("\\", r"\\")
    try:
        old.sub(template, "")  # reports an invalid group reference before any file is read
    except (re.error, IndexError) as error:
        raise Refused(f"captions replace: NEW {new} is not a valid replacement ({error})") from None

    def edit(caption: str) -> str:
        changed = old.sub(template, caption)
        return caption if changed == caption else tidy(changed)

    return edit


def adding(words: str, position: Position) -> Edit:
    """An edit that adds words at the front or the end, unless the caption contains them; case is ignored."""
    present = pattern(words, False, True, "captions add")

    def edit(caption: str) -> str:
        if present.search(caption):
            return caption
        return ", ".join(filter(None, (words, caption) if position == "front" else (tidy(caption), words)))

    return edit


def removing(tags: Sequence[str], regex: bool) -> Edit:
    """An edit that removes whole tags; case is ignored. With `regex`, each regex must match a tag from end to end."""
    unwanted = [
        pattern(tag, True, True, "captions remove") if regex else re.compile(re.escape(tag), re.I) for tag in tags
    ]

    def edit(caption: str) -> str:
        parts = tags_of(caption)
        remaining = [part for part in parts if not any(one.fullmatch(part) for one in unwanted)]
        return caption if remaining == parts else ", ".join(remaining)

    return edit


def deduped(caption: str) -> str:
    """The caption without repeated tags; the first occurrence is kept and case is ignored."""
    parts = tags_of(caption)
    first: dict[str, str] = {}
    for part in parts:
        first.setdefault(part.lower(), part)
    return caption if len(first) == len(parts) else ", ".join(first.values())


def sorting(counts: Counter[str] | None, keep_tags: int) -> Edit:
    """An edit that sorts the tags after the first `keep_tags`: by `counts`, most frequent first, else by alphabet."""

    def sort_key(tag: str) -> tuple[int, str]:
        return (-counts[tag.lower()] if counts else 0, tag.lower())

    def edit(caption: str) -> str:
        parts = tags_of(caption)
        ordered = parts[:keep_tags] + sorted(parts[keep_tags:], key=sort_key)
        return caption if ordered == parts else ", ".join(ordered)

    return edit


def drop_words(caption: str, words: Sequence[str]) -> str:
    """Remove words from a caption, as whole tags and as whole words inside sentences; case is ignored."""
    for one in words:
        caption = removing([one], regex=False)(caption)
        caption = replacing(pattern(one, False, True, "--drop"), "", regex=False)(caption)
    return caption


def tidy(caption: str) -> str:
    """Remove the empty tags, double spaces and spaces before punctuation that removed words leave behind."""
    caption = re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"\s+", " ", caption))
    caption = re.sub(r"(?:,\s*)+(?=[,.;:!?])", "", caption)
    return caption.strip(" ,")


def tag_counts(captions: Sequence[str]) -> Counter[str]:
    """Lower-case tag -> number of captions that contain it."""
    return Counter(tag for caption in captions for tag in {tag.lower() for tag in tags_of(caption)})


def word_counts(captions: Sequence[str]) -> Counter[str]:
    """Lower-case word -> number of captions that contain it."""
    return Counter(word for caption in captions for word in set(re.findall(r"[^\W_][\w'-]*", caption.lower())))
