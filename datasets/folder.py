"""An image folder -> examples: each picture with its caption and how often it is seen in an epoch.

Two layouts: pictures in one folder, or kohya's folders `<repeats>_<class words>` in it. A `.txt` or `.caption`
file of the same name is the caption; without one, the class words of a kohya folder are.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from scumble.configs.errors import Refused

from .images import SUFFIXES

KOHYA_FOLDER = re.compile(r"(\d+)_(.+)")
CAPTION_SUFFIXES = (".txt", ".caption")


@dataclass(frozen=True)
class Example:
    """One picture of the set. `prior` marks a regularisation picture."""

    image: Path
    caption: str
    repeats: int
    prior: bool = False


def read_folder(folder: Path, repeats: int = 1, prior: bool = False) -> list[Example]:
    """Every picture of `folder`, sorted by path. Raises `Refused` where there is none, or a caption is not UTF-8."""
    if not folder.is_dir():
        raise Refused(f"{folder}: no such folder of pictures")
    parts = [(folder, repeats, "")]
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        if named := KOHYA_FOLDER.fullmatch(inner.name):
            if int(named[1]) < 1:
                raise Refused(f"{inner}: repeats must be at least 1; rename the folder or take it out")
            parts.append((inner, int(named[1]) * repeats, named[2].strip()))
    examples = [
        Example(image, read_caption(image, words), times, prior)
        for place, times, words in parts
        for image in sorted(place.iterdir())
        if image.suffix.lower() in SUFFIXES and image.is_file() and not image.name.startswith(".")
    ]
    if not examples:
        known = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise Refused(f"{folder}: no pictures there ({known}), nor in folders named like 10_words")
    return examples


def read_caption(image: Path, default: str) -> str:
    """The text beside a picture on one line, or `default` where there is no text file."""
    for suffix in CAPTION_SUFFIXES:
        path = image.with_suffix(suffix)
        if path.is_file():
            try:
                return " ".join(path.read_text(encoding="utf-8-sig").split())
            except UnicodeDecodeError:
                raise Refused(f"{path} is not UTF-8: save it as UTF-8 or delete it") from None
    return default
