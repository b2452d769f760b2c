"""Checks of captions, by the base's own tokenizer where length counts."""

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from statistics import median
from textwrap import shorten

from scumble.configs.words import counted

from .evidence import Evidence, Observation, details, others
from .measure import ImageMeasures

TAG_WORDS = 4  # a longer part between commas is a sentence
TAGGED = 4  # median tags of a caption from which a set is taken to be tagged
SHOWN = 8  # tags named in a line
LOST_SHOWN = 60  # characters
MOST_TAGS = 400  # compared with each other


def missing(material: Evidence) -> Iterator[Observation]:
    bare = [look for look, caption in material.written if not caption]
    if not bare:
        return
    told = details([(look, "its caption file is empty" if look.subject.example.sidecar else "no caption")
                    for look in bare])  # fmt: skip
    if len(bare) < len(material.measures):
        yield Observation(
            "warning", f"{counted(len(bare), 'picture')} of {len(material.measures)} without a caption", told
        )
    elif material.trigger:
        what = "no picture has a caption: the trigger alone stands for all that is in them"
        yield Observation("warning", what, told)
    else:
        cure = "give --trigger a word, and write NAME.txt beside each picture: what is to be seen, without the style"
        yield Observation(
            "serious", "no picture has a caption, and there is no trigger: nothing calls the adapter", told, cure
        )


def alike(material: Evidence) -> Iterator[Observation]:
    by_caption: dict[str, list[ImageMeasures]] = {}
    for look, caption in material.written:
        if caption and caption != look.subject.example.words:
            by_caption.setdefault(caption.lower(), []).append(look)
    groups = [group for group in by_caption.values() if len({look.digest for look in group}) > 1]
    if groups:
        count = sum(map(len, groups))
        told = [(look, f"same caption as {others(look, group)}") for group in groups for look in group]
        yield Observation(
            "warning", f"{count} different pictures share {counted(len(groups), 'caption')}", details(told)
        )


def long(material: Evidence) -> Iterator[Observation]:
    told, lacking = [], []
    for look, text in zip(material.measures, material.caption_texts, strict=True):
        heard = material.count_tokens(text)
        if heard.lost:
            lost = shorten(heard.lost, LOST_SHOWN, placeholder=" …")
            told.append((look, f"{heard.tokens} tokens; not heard: “{lost}”"))
            if material.trigger and material.trigger.lower() not in heard.kept.lower():
                lacking.append(look)
    if told:
        size = min(window.size for window in material.windows)
        what = f"{counted(len(told), 'caption')} longer than the {size} tokens that the base hears"
        if lacking:
            what += f"; of {len(lacking)} the trigger itself is cut off"
        yield Observation("serious" if lacking else "warning", what, details(told))


def trigger(material: Evidence) -> Iterator[Observation]:
    if not material.trigger:
        return
    lacking = [look for look, caption in material.written if material.trigger.lower() not in caption.lower()]
    if lacking and len(lacking) < len(material.measures):
        what = f"“{material.trigger}” stands in {len(material.measures) - len(lacking)} of {len(material.measures)} captions"
        yield Observation(
            "note", f"{what}; it is put before the others", details([(x, "lacks the trigger") for x in lacking])
        )


def uncalled(material: Evidence) -> Iterator[Observation]:
    written = any(caption for _, caption in material.written)
    if material.kind == "character" and written and not material.trigger and not _shared(material):
        yield Observation("warning", "there is no trigger, and no words that all captions share")


def shared(material: Evidence) -> Iterator[Observation]:
    tags = [tag for tag in _shared(material) if material.trigger.lower() not in tag or not material.trigger]
    if tags and len(material.measures) > 1:
        named = ", ".join(f"“{tag}”" for tag in tags[:SHOWN])
        more = f" and {len(tags) - SHOWN} more" if len(tags) > SHOWN else ""
        yield Observation("note", f"{named}{more} in all {len(material.measures)} captions")


def spellings(material: Evidence) -> Iterator[Observation]:
    counts = _counts(material)
    usual = [tag for tag, _ in counts.most_common(MOST_TAGS)]
    pairs = [pair for pair in combinations(usual, 2) if _joined(*pair) or _slipped(*pair, material)]
    if pairs:
        named = "; ".join(f"“{one}” ({counts[one]}) and “{other}” ({counts[other]})" for one, other in pairs[:SHOWN])
        told = [
            (look, " ".join(f"“{rarer}” beside “{one}”" for one, rarer in pairs if rarer in _tags(caption)))
            for look, caption in material.written
            if any(rarer in _tags(caption) for _, rarer in pairs)
        ]
        yield Observation("warning", f"tags that look like two spellings of one: {named}", details(told))


def once(material: Evidence) -> Iterator[Observation]:
    tagged = [len(_tags(caption)) for _, caption in material.written if caption]
    if not tagged or median(tagged) < TAGGED:
        return
    rare = [tag for tag, count in _counts(material).items() if count == 1]
    if rare:
        more = f" and {len(rare) - SHOWN} more" if len(rare) > SHOWN else ""
        yield Observation("note", f"{counted(len(rare), 'tag')} in one caption only: {', '.join(rare[:SHOWN])}{more}")


def _tags(caption: str) -> set[str]:
    """The parts between commas that are no sentences, in lower case."""
    parts = (" ".join(part.lower().split()) for part in caption.split(","))
    return {part for part in parts if part and len(part.split()) <= TAG_WORDS}


def _counts(material: Evidence) -> Counter[str]:
    """How many captions each tag stands in, the commonest first."""
    return Counter(tag for _, caption in material.written for tag in sorted(_tags(caption)))


def _shared(material: Evidence) -> list[str]:
    return [tag for tag, count in _counts(material).items() if count == len(material.measures)]


def _joined(one: str, other: str) -> bool:
    """Alike but for hyphens and spaces, or a plural."""
    return min(len(one), len(other)) >= 5 and (
        one.translate(JOINED) == other.translate(JOINED) or one + "s" == other or other + "s" == one
    )


def _slipped(one: str, rarer: str, material: Evidence) -> bool:
    """A slip of one letter that makes the rarer tag a word that the tokenizer does not know.

    “white shirt” and “white skirt” are words of one token each, “white shrit” is of more.
    """
    if min(len(one), len(rarer)) < 6 or one[0] != rarer[0] or any(letter.isdigit() for letter in one + rarer):
        return False
    if abs(len(one) - len(rarer)) > 1 or not _one_slip(one, rarer):
        return False
    return any(window.count(rarer).tokens > window.count(one).tokens for window in material.windows)


def _one_slip(one: str, other: str) -> bool:
    """One letter more, less or other, or two changed about, inside the words (Damerau 1964)."""
    start = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    rest, others = one[start:], other[start:]
    return any((rest[1:] == others[1:], rest[1:] == others, rest == others[1:],
                rest[:2] == others[1::-1] and rest[2:] == others[2:]))  # fmt: skip


JOINED = str.maketrans("", "", "-_ '")
