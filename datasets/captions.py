"""What training hears of a caption in one step; every chance in it from (seed, step, index)."""

import random
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from scumble.configs.options import Captions

from .wildcards import chosen

Rules = TypeVar("Rules", bound=Captions)
NOT_RANDOM = {"caption_dropout": 0.0, "tag_dropout": 0.0, "shuffle_tags": False}
"""Rules under which nothing is left out and all stays in its order."""


def with_folder_rules(rules: Rules, own: Iterable[tuple[str, Any]]) -> Rules:
    """The rules with those in their place that a list of folders has for one of its own."""
    known = {key: value for key, value in own if key in type(rules).model_fields}
    return rules.model_copy(update=known) if known else rules


def with_trigger(caption: str, trigger: str, position: str = "front") -> str:
    """The caption with the trigger words at its `position` (front or end), unless it has them already."""
    if not trigger or trigger.lower() in caption.lower():
        return caption
    parts = (trigger, caption) if position == "front" else (caption.rstrip(" ,"), trigger)
    return ", ".join(filter(None, parts))


def tags_of(caption: str) -> list[str]:
    """The parts between commas that say something."""
    return [tag.strip() for tag in caption.split(",") if tag.strip()]


def caption_at_step(lines: Sequence[str], rules: Captions, *, seed: int, step: int, index: int) -> str:
    """What is heard of example `index` in optimiser step `step`; `lines` are those of its caption.

    Now and then nothing (Ho and Salimans 2022, for guidance). Else in this order: one line or all of them, one way
    at each wildcard, the trigger in front unless it is there, tags shuffled and dropped behind the kept ones, and
    prefix and suffix around it. A tag with the trigger in it is never dropped.
    """
    draw = random.Random(f"{seed}/{step}/{index}/caption")
    if draw.random() < rules.caption_dropout:
        return ""
    text = (draw.choice(lines) if lines else "") if rules.caption_lines == "pick" else " ".join(lines)
    if rules.wildcards:
        text = chosen(text, draw)
    around = f"{rules.caption_prefix} {rules.caption_suffix}".lower()
    if rules.trigger and rules.trigger.lower() not in around:
        text = with_trigger(text, rules.trigger, rules.trigger_position)
    if rules.shuffle_tags or rules.tag_dropout:
        text = ", ".join(_tossed(tags_of(text), rules, draw))
    return framed(text, rules.caption_prefix, rules.caption_suffix)


def framed(text: str, prefix: str, suffix: str) -> str:
    """The text between prefix and suffix, a space between them, none before a suffix that begins with , . ; or :."""
    before = f"{prefix.strip()} " if prefix.strip() else ""
    after = suffix.strip()
    gap = "" if after[:1] in ",.;:" else " "
    return (before + text + gap + after).strip()


def _tossed(tags: Sequence[str], rules: Captions, draw: random.Random) -> list[str]:
    kept, others = list(tags[: rules.keep_tags]), list(tags[rules.keep_tags :])
    if rules.shuffle_tags:
        draw.shuffle(others)
    trigger = rules.trigger.lower()
    return kept + [tag for tag in others if draw.random() >= rules.tag_dropout or (trigger and trigger in tag.lower())]
