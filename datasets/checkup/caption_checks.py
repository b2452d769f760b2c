"""Checks of captions. Token counts come from the tokenizers of the base model."""

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from statistics import median
from textwrap import shorten

from scumble.configs.words import counted

from .evidence import Evidence, Observation, details_of, names_of_others
from .measure import ImageMeasures

TAG_WORDS = 4  # a part between commas with more words is a sentence, not a tag
TAGGED = 4  # a dataset counts as tagged from this median number of tags per caption
SHOWN = 8  # tags listed in a finding
LOST_SHOWN = 60  # characters
WRITE_CAPTION = "describe what each image shows, but not the style itself, in a caption file NAME.txt"
MAX_TAGS = 400  # the most frequent tags, compared in pairs


def missing(evidence: Evidence) -> Iterator[Observation]:
    bare = [image for image, caption in evidence.written if not caption]
    if not bare:
        return
    details = details_of([(image, "the caption file is empty" if image.subject.example.sidecar else "no caption")
                          for image in bare])  # fmt: skip
    if len(bare) < len(evidence.measures):
        yield Observation("warning", f"{len(bare)} of {len(evidence.measures)} images without a caption", details)
    elif evidence.trigger:
        what = "no image has a caption, so the trigger has to describe everything in the images"
        yield Observation("warning", what, details)
    else:
        cure = f"set --trigger to a word, and {WRITE_CAPTION}"
        what = "no image has a caption, and there is no trigger: no prompt can activate the adapter"
        yield Observation("serious", what, details, cure)


def alike(evidence: Evidence) -> Iterator[Observation]:
    by_caption: dict[str, list[ImageMeasures]] = {}
    for image, caption in evidence.written:
        if caption and caption != image.subject.example.words:
            by_caption.setdefault(caption.lower(), []).append(image)
    groups = [group for group in by_caption.values() if len({image.digest for image in group}) > 1]
    if groups:
        count = sum(map(len, groups))
        texts = [(image, f"same caption as {names_of_others(image, group)}") for group in groups for image in group]
        yield Observation(
            "warning", f"{count} different images share {counted(len(groups), 'caption')}", details_of(texts)
        )


def long(evidence: Evidence) -> Iterator[Observation]:
    texts, without_trigger = [], []
    for image, caption in zip(evidence.measures, evidence.caption_texts, strict=True):
        count = evidence.count_tokens(caption)
        if count.lost:
            lost = shorten(count.lost, LOST_SHOWN, placeholder=" …")
            texts.append((image, f"{count.tokens} tokens; ignored: “{lost}”"))
            if evidence.trigger and evidence.trigger.lower() not in count.kept.lower():
                without_trigger.append(image)
    if texts:
        size = min(window.size for window in evidence.windows)
        what = f"{counted(len(texts), 'caption')} longer than the limit of {size} tokens"
        if without_trigger:
            what += f"; the trigger is cut off in {len(without_trigger)} of them"
        yield Observation("serious" if without_trigger else "warning", what, details_of(texts))


def trigger(evidence: Evidence) -> Iterator[Observation]:
    if not evidence.trigger:
        return
    lacking = [image for image, caption in evidence.written if evidence.trigger.lower() not in caption.lower()]
    total = len(evidence.measures)
    if lacking and len(lacking) < total:
        what = f"“{evidence.trigger}” is in {total - len(lacking)} of {total} captions, and is added to the others"
        yield Observation("note", what, details_of([(image, "no trigger in the caption") for image in lacking]))


def uncalled(evidence: Evidence) -> Iterator[Observation]:
    written = any(caption for _, caption in evidence.written)
    if evidence.kind == "character" and written and not evidence.trigger and not _shared(evidence):
        yield Observation("warning", "no trigger, and no tag that all captions share")


def shared(evidence: Evidence) -> Iterator[Observation]:
    tags = [tag for tag in _shared(evidence) if evidence.trigger.lower() not in tag or not evidence.trigger]
    if tags and len(evidence.measures) > 1:
        listed = ", ".join(f"“{tag}”" for tag in tags[:SHOWN])
        more = f" and {len(tags) - SHOWN} more" if len(tags) > SHOWN else ""
        yield Observation("note", f"{listed}{more} in all {len(evidence.measures)} captions")


def spellings(evidence: Evidence) -> Iterator[Observation]:
    counts = _counts(evidence)
    frequent = [tag for tag, _ in counts.most_common(MAX_TAGS)]
    pairs = [pair for pair in combinations(frequent, 2) if _differ_in_form(*pair) or _is_typo(*pair, evidence)]
    if pairs:
        listed = "; ".join(f"“{one}” ({counts[one]}) and “{other}” ({counts[other]})" for one, other in pairs[:SHOWN])
        texts = [
            (image, "; ".join(f"“{rarer}”, elsewhere “{one}”" for one, rarer in pairs if rarer in _tags(caption)))
            for image, caption in evidence.written
            if any(rarer in _tags(caption) for _, rarer in pairs)
        ]
        yield Observation("warning", f"tags that look like two spellings of the same tag: {listed}", details_of(texts))


def once(evidence: Evidence) -> Iterator[Observation]:
    num_tags = [len(_tags(caption)) for _, caption in evidence.written if caption]
    if not num_tags or median(num_tags) < TAGGED:
        return
    rare = [tag for tag, count in _counts(evidence).items() if count == 1]
    if rare:
        more = f" and {len(rare) - SHOWN} more" if len(rare) > SHOWN else ""
        yield Observation("note", f"{counted(len(rare), 'tag')} in one caption only: {', '.join(rare[:SHOWN])}{more}")


def _tags(caption: str) -> set[str]:
    """Return the tags of a caption in lower case: the parts between commas, without sentences."""
    parts = (" ".join(part.lower().split()) for part in caption.split(","))
    return {part for part in parts if part and len(part.split()) <= TAG_WORDS}


def _counts(evidence: Evidence) -> Counter[str]:
    """Count the captions that contain each tag."""
    return Counter(tag for _, caption in evidence.written for tag in sorted(_tags(caption)))


def _shared(evidence: Evidence) -> list[str]:
    return [tag for tag, count in _counts(evidence).items() if count == len(evidence.measures)]


def _differ_in_form(one: str, other: str) -> bool:
    """Whether two tags differ only in hyphens, spaces, apostrophes or a plural s."""
    return min(len(one), len(other)) >= 5 and (
        one.translate(FORM_CHARACTERS) == other.translate(FORM_CHARACTERS) or one + "s" == other or other + "s" == one
    )


def _is_typo(one: str, rarer: str, evidence: Evidence) -> bool:
    """Whether the rarer tag is a one-character typo that the tokenizer does not know as a word.

    “white shirt” and “white skirt” are words of one token each; “white shrit” has more tokens.
    """
    if min(len(one), len(rarer)) < 6 or one[0] != rarer[0] or any(character.isdigit() for character in one + rarer):
        return False
    if abs(len(one) - len(rarer)) > 1 or not _one_edit_apart(one, rarer):
        return False
    return any(window.count(rarer).tokens > window.count(one).tokens for window in evidence.windows)


def _one_edit_apart(one: str, other: str) -> bool:
    """Whether one insertion, deletion, substitution or transposition turns one into the other (Damerau 1964)."""
    start = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    rest, others = one[start:], other[start:]
    return any((rest[1:] == others[1:], rest[1:] == others, rest == others[1:],
                rest[:2] == others[1::-1] and rest[2:] == others[2:]))  # fmt: skip


FORM_CHARACTERS = str.maketrans("", "", "-_ '")
