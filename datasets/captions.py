"""What a caption says in one step: trigger in front, tags shuffled, sometimes nothing; from (seed, step, index)."""

import random


def with_trigger(caption: str, trigger: str) -> str:
    """The caption with the trigger words before it, unless it has them already."""
    if not trigger or trigger.lower() in caption.lower():
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def said(caption: str, *, shuffle_tags: bool, keep_tags: int, dropout: float, seed: int, step: int, index: int) -> str:
    """The caption of example `index` in optimiser step `step`."""
    draw = random.Random(f"{seed}/{step}/{index}/caption")
    if draw.random() < dropout:
        return ""
    if not shuffle_tags:
        return caption
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    shuffled = tags[keep_tags:]
    draw.shuffle(shuffled)
    return ", ".join(tags[:keep_tags] + shuffled)
