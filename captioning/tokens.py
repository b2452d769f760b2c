"""Tokens of a caption by CLIP's own tokenizer, which Stable Diffusion 1, 2 and XL share."""

from collections.abc import Sequence

from scumble.configs.files import BASES
from scumble.datasets.checkup.token_window import read_window

TOKENIZER = BASES / "sd15/tokenizer"
WINDOW = 75  # 77 with the marks of begin and end


def num_tokens(captions: Sequence[str]) -> list[int]:
    """How many tokens each caption has, begin and end not counted."""
    window = read_window(TOKENIZER)
    return [window.count(caption).tokens for caption in captions]
