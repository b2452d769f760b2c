"""Token counts of captions, from the CLIP tokenizer that Stable Diffusion 1, 2 and XL share."""

from collections.abc import Sequence

from scumble.configs.files import BASES
from scumble.datasets.checkup.token_window import read_window

TOKENIZER = BASES / "sd15/tokenizer"
WINDOW = 75  # 77 with the begin and end tokens


def num_tokens(captions: Sequence[str]) -> list[int]:
    """The number of tokens in each caption, without the begin and end tokens."""
    window = read_window(TOKENIZER)
    return [window.count(caption).tokens for caption in captions]
