"""Captions that lie beside pictures: text files of the same name, in the encodings that editors write."""

import codecs
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from scumble.configs.errors import Refused

CAPTION_SUFFIXES = (".txt", ".caption")
MAX_BYTES = 1_000_000  # a caption is a line or a few; a longer file is something else
MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def decoded(data: bytes, path: Path) -> str:
    """Text in UTF-8 or UTF-16, with a byte order mark or without. Raises `Refused` naming `path` for any other.

    UTF-16 without a mark is told by its zero bytes, which Latin text has in every second place and UTF-8 never has.
    """
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in data:
        encoding = "utf-16-le" if data[1::2].count(0) >= data[::2].count(0) else "utf-16-be"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise Refused(f"{path} is not UTF-8: save it as UTF-8 or delete it")
    return text


def read_text(path: Path) -> str:
    """A text file of any of those encodings. Raises `Refused` naming a file that cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})") from None
    if len(data) > MAX_BYTES:
        raise Refused(f"{path} is longer than {MAX_BYTES // 1_000_000} MB, so it is no caption: take it out")
    return decoded(data, path)


def lines_of(text: str) -> tuple[str, ...]:
    """The lines of a caption that say something, white space in them made one space."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return tuple(line for line in lines if line)


class Sidecars:
    """The text files of one folder by the picture that they belong to.

    `a.txt` belongs to `a.jpg` and to `a.png`; `a.jpg.txt` to `a.jpg` alone. Case and Unicode form do not count
    (a Mac writes é as two characters) unless two names differ in nothing else.
    """

    def __init__(self, paths: Iterable[Path], suffixes: Sequence[str] = CAPTION_SUFFIXES):
        self.suffixes = suffixes
        self.by_name: dict[tuple[str, str], list[Path]] = {}
        for path in paths:
            self.by_name.setdefault((folded(path.stem), path.suffix.lower()), []).append(path)

    def beside(self, image: Path) -> list[Path]:
        """The text files of a picture, that which counts first."""
        found = []
        for name in (image.name, image.stem):
            for suffix in self.suffixes:
                alike = self.by_name.get((folded(name), suffix), [])
                found += sorted(alike, key=lambda path, name=name: path.stem != name)[:1]
        return found


def folded(name: str) -> str:
    """A name by which spellings of one name are found alike."""
    return unicodedata.normalize("NFC", name).casefold()
