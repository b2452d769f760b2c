"""Captions from file names: `red_apple-03.png` becomes `red apple`."""

import re
from collections.abc import Sequence

from .picture import ImageFile

CAMERAS = r"img|dsc[fn]?|dscn?|pxl|pict?|mvimg|gopr|dji|imag|p|cimg|sam|wp|vid|scan|screenshot|screen shot"
NOT_WORDS = re.compile(
    rf"^(?:{CAMERAS})(?=[\s\d]|$)|^(?:image|photo|picture|untitled|unnamed|download|output|file|comfyui|grid)(?=[\s\d]|$)",
    re.IGNORECASE,
)
HASH = re.compile(r"[0-9a-f]{8,}(?:[ -][0-9a-f]{4,})*", re.IGNORECASE)


class Filename:
    """Returns the words of the file name; no text for names that cameras and programs generate."""

    def captions(self, images: Sequence[ImageFile]) -> list[str]:
        return [words_of(image.path.stem) for image in images]


def words_of(stem: str) -> str:
    """`red_apple-03` -> `red apple`; `IMG_2041`, a hash or a number -> an empty string."""
    if HASH.fullmatch(stem) and re.search(r"\d", stem):
        return ""
    text = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", stem)  # RedApple
    text = re.sub(r"[_+.~\s]+|-+", " ", text)
    text = re.sub(r"\(\s*\d*\s*\)|\[[^]]*\]|\bcopy\b", " ", text, flags=re.IGNORECASE)
    text = NOT_WORDS.sub(" ", " ".join(text.split()))
    words = [word for word in text.split() if re.search(r"[^\W\d_]", word) and not _is_code(word)]
    return " ".join(words)


def _is_code(word: str) -> bool:
    """Whether at least half of the characters are digits: 1024x768, v2, 3a7f9c."""
    digits = sum(letter.isdigit() for letter in word)
    return digits > 0 and digits >= len(word) / 2
