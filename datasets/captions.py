"""Builds the caption text of each training sample. All randomness comes from (seed, step, index)."""

import random
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from scumble.configs.options import Captions

from .wildcards import expand_wildcards

Rules = TypeVar("Rules", bound=Captions)
NOT_RANDOM = {"caption_dropout": 0.0, "tag_dropout": 0.0, "shuffle_tags": False}
"""Overrides that switch off dropout and shuffling."""


def with_folder_rules(rules: Rules, own: Iterable[tuple[str, Any]]) -> Rules:
    """Return the rules, overridden by those of one folder in a list of folders."""
    known = {key: value for key, value in own if key in type(rules).model_fields}
    return rules.model_copy(update=known) if known else rules


def with_trigger(caption: str, trigger: str, position: str = "front") -> str:
    """Return the caption with the trigger added at `position` (front or end), unless the caption contains it."""
    if not trigger or trigger.lower() in caption.lower():
        return caption
    parts = (trigger, caption) if position == "front" else (caption.rstrip(" ,"), trigger)
    return ", ".join(filter(None, parts))


def tags_of(caption: str) -> list[str]:
    """Return the non-empty parts between commas."""
    return [tag.strip() for tag in caption.split(",") if tag.strip()]


def caption_at_step(lines: Sequence[str], rules: Captions, *, seed: int, step: int, index: int) -> str:
    """Return the caption text of example `index` in optimizer step `step`, from the lines of its caption.

    With probability `caption_dropout` it is empty, for classifier-free guidance (Ho and Salimans 2022). Otherwise, in
    this order: pick a line or join all of them, expand wildcards, add the trigger unless it is there, shuffle and drop
    tags after the first `keep_tags`, and add the prefix and suffix. A tag that contains the trigger is never dropped.
    With `trigger_position` "end", the trigger is added after shuffling.
    """
    rng = random.Random(f"{seed}/{step}/{index}/caption")
    if rng.random() < rules.caption_dropout:
        return ""
    text = (rng.choice(lines) if lines else "") if rules.caption_lines == "pick" else " ".join(lines)
    if rules.wildcards:
        text = expand_wildcards(text, rng)
    around = f"{rules.caption_prefix} {rules.caption_suffix}".lower()
    trigger = "" if rules.trigger.lower() in around else rules.trigger
    if rules.trigger_position == "front":
        text = with_trigger(text, trigger)
    if rules.shuffle_tags or rules.tag_dropout:
        text = ", ".join(_shuffled_and_dropped(tags_of(text), rules, rng))
    text = with_trigger(text, trigger, rules.trigger_position)  # at the end it is not shuffled
    return framed(text, rules.caption_prefix, rules.caption_suffix)


def framed(text: str, prefix: str, suffix: str) -> str:
    """Join prefix, text and suffix with spaces, but without one before a suffix that starts with , . ; or :."""
    before = f"{prefix.strip()} " if prefix.strip() else ""
    after = suffix.strip()
    gap = "" if after[:1] in ",.;:" else " "
    return (before + text + gap + after).strip()


def _shuffled_and_dropped(tags: Sequence[str], rules: Captions, rng: random.Random) -> list[str]:
    kept, others = list(tags[: rules.keep_tags]), list(tags[rules.keep_tags :])
    if rules.shuffle_tags:
        rng.shuffle(others)
    trigger = rules.trigger.lower()
    return kept + [tag for tag in others if rng.random() >= rules.tag_dropout or (trigger and trigger in tag.lower())]
