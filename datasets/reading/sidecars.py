"""Caption files: text files next to the images, with the same name, in any encoding that editors write."""

import codecs
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from scumble.configs.errors import Refused

CAPTION_SUFFIXES = (".txt", ".caption")
MAX_BYTES = 1_000_000  # captions are a few lines; a longer file is something else
MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def decoded(data: bytes, path: Path) -> str:
    """Decode UTF-8 or UTF-16, with or without a byte order mark. Raises `Refused` naming `path` for anything else.

    UTF-16 without a mark is detected by its zero bytes: Latin text has one in every second byte, UTF-8 has none.
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
    """Read a text file in any of these encodings. Raises `Refused` naming a file that cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})") from None
    if len(data) > MAX_BYTES:
        raise Refused(f"{path} is larger than {MAX_BYTES // 1_000_000} MB, too large for a caption: delete it")
    return decoded(data, path)


def lines_of(text: str) -> tuple[str, ...]:
    """Return the non-empty lines of a caption, with runs of whitespace collapsed to one space."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return tuple(line for line in lines if line)


class Sidecars:
    """Finds the caption files of an image among the text files of one folder.

    `a.txt` belongs to `a.jpg` and to `a.png`; `a.jpg.txt` belongs to `a.jpg` only. Case and Unicode normalization
    are ignored (macOS stores é as two characters) unless two names differ in nothing else.
    """

    def __init__(self, paths: Iterable[Path], suffixes: Sequence[str] = CAPTION_SUFFIXES):
        self.suffixes = suffixes
        self.by_name: dict[tuple[str, str], list[Path]] = {}
        for path in paths:
            self.by_name.setdefault((folded(path.stem), path.suffix.lower()), []).append(path)

    def find(self, image: Path) -> list[Path]:
        """Return the caption files of an image, the one that is used first."""
        found = []
        for name in (image.name, image.stem):
            for suffix in self.suffixes:
                alike = self.by_name.get((folded(name), suffix), [])
                found += sorted(alike, key=lambda path, name=name: path.stem != name)[:1]
        return found


def folded(name: str) -> str:
    """Return a key that is equal for all spellings of a file name (case and Unicode normalization)."""
    return unicodedata.normalize("NFC", name).casefold()
