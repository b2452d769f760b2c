"""The captions of a set as files: which file is a picture's, what it says, and who wrote it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from scumble.configs.errors import Refused
from scumble.datasets.reading.discovery import TABLES
from scumble.datasets.reading.folder import Example, ImageSet, read_set
from scumble.datasets.reading.sidecars import folded, lines_of, read_text

from .changes import Origin, hashed, written_in

CaptionSource = Literal["none", "words", "table", "hand", "scumble"]


@dataclass(frozen=True)
class Text:
    """The caption of one picture, read from `stands_in`; `file` is where a new one is written.

    `lines` are those of the file; those of `example` have what a list of folders (TOML) puts around them too.
    `source` tells who wrote `lines`: nobody, the folder's name (kohya's class words), a table (`metadata.jsonl`),
    a person, or a captioner, of which `origin` knows more.
    """

    example: Example
    file: Path
    stands_in: Path | None
    lines: tuple[str, ...]
    source: CaptionSource
    origin: Origin | None = None

    @property
    def picture(self) -> Path:
        return self.example.image

    @property
    def is_caption(self) -> bool:
        """Whether somebody wrote it for this picture."""
        return self.source not in ("none", "words")

    @property
    def is_ours(self) -> bool:
        """Whether a captioner wrote it and no person's words are in it."""
        return self.source == "scumble" and self.origin is not None and not self.origin.mixed


def check_writable(texts: Sequence[Text]) -> None:
    """Raises `Refused` where texts beside the pictures are not read, so that new ones would change nothing."""
    for text in texts:
        file = text.example.sidecar
        if file and _is_kohyas(file):
            raise Refused(
                f"{file}: captions in it are not edited; take metadata_file out of the list of folders, "
                "or edit the file itself"
            )


def read_texts(source: Path) -> tuple[list[Text], ImageSet]:
    """The captions of the pictures to learn from, and the set; regularisation pictures stay out, pixels unread.

    Of pictures that share one text file each has one of its own to be written: `a.jpg.txt` beside `a.png.txt`.
    """
    found = read_set(source, decode=False)
    examples = list({example.image: example for example in found.examples}.values())  # a list may name one twice
    owners = Counter(_name(_usual(example)) for example in examples)
    written: dict[Path, dict[tuple[str, str], Origin]] = {}
    texts = []
    for example in examples:
        if example.is_regularization:
            continue
        usual = _usual(example)
        file = usual if owners[_name(usual)] == 1 else example.image.with_name(f"{example.image.name}.txt")
        stands_in, origin = None if _in_table(example) else example.sidecar, None
        if stands_in:
            folder = stands_in.parent
            if folder not in written:
                written[folder] = written_in(folder)
            if written[folder]:
                origin = written[folder].get((stands_in.name, hashed(stands_in.read_bytes())))
        lines = lines_of(read_text(stands_in)) if stands_in else example.lines
        told = Text(example, file, stands_in, lines, _source(example), origin)
        texts.append(told if origin is None else replace(told, source="scumble"))
    return texts, found


def _in_table(example: Example) -> bool:
    sidecar = example.sidecar
    return sidecar is not None and (sidecar.name.lower() in TABLES or _is_kohyas(sidecar))


def _is_kohyas(file: Path) -> bool:
    return file.suffix.lower() == ".json"


def _usual(example: Example) -> Path:
    """The text file that is read, or the one of the picture's name."""
    if example.sidecar is None or _in_table(example):
        return example.image.with_name(f"{example.image.stem}.txt")
    return example.sidecar


def _name(file: Path) -> tuple[Path, str]:
    """By which files are told apart: the case of a name does not count."""
    return file.parent, folded(file.name)


def _source(example: Example) -> CaptionSource:
    if not example.lines:
        return "none"
    if example.sidecar is None:
        return "words"
    return "table" if _in_table(example) else "hand"
