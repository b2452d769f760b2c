"""Tokens of a caption by CLIP's own tokenizer, which Stable Diffusion 1, 2 and XL share."""

from collections.abc import Sequence
from pathlib import Path

from scumble.datasets.tokens import read_window

TOKENIZER = Path(__file__).parent.parent.resolve() / "configs" / "bases" / "sd15" / "tokenizer"
WINDOW = 75  # 77 with the marks of begin and end


def num_tokens(captions: Sequence[str]) -> list[int]:
    """How many tokens each caption has, begin and end not counted."""
    window = read_window(TOKENIZER)
    return [window.hears(caption).tokens for caption in captions]
