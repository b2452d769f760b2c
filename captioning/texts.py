"""The captions of an image set: which file belongs to an image, what it contains, and who wrote it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from scumble.configs.errors import Refused
from scumble.datasets.reading.discovery import TABLES
from scumble.datasets.reading.folder import Example, ImageSet, read_set
from scumble.datasets.reading.sidecars import folded, lines_of, read_text

from .changes import Origin, read_origins, sha256

CaptionSource = Literal["none", "class words", "table", "manual", "generated"]


@dataclass(frozen=True)
class CaptionEntry:
    """The caption of one image, read from `caption_file` if there is one; a new caption goes to `target_file`.

    `lines` are the lines of the file; `example.lines` also include the prefix and suffix from a dataset TOML file.
    `source` is the author of `lines`: nobody, the folder name (kohya's class words), a table (`metadata.jsonl`), a
    person, or a captioner. `origin` is set if it is a captioner.
    """

    example: Example
    target_file: Path
    caption_file: Path | None
    lines: tuple[str, ...]
    source: CaptionSource
    origin: Origin | None = None

    @property
    def image(self) -> Path:
        return self.example.image

    @property
    def has_caption(self) -> bool:
        """Whether the image has a caption of its own."""
        return self.source not in ("none", "class words")

    @property
    def is_generated(self) -> bool:
        """Whether a captioner wrote the whole caption."""
        return self.source == "generated" and self.origin is not None and not self.origin.mixed


def check_writable(entries: Sequence[CaptionEntry]) -> None:
    """Raises `Refused` if captions come from kohya's JSON metadata, where new caption files would have no effect."""
    for entry in entries:
        file = entry.example.sidecar
        if file and _is_kohya_json(file):
            raise Refused(
                f"{file}: captions in this file cannot be edited; edit the file itself, or remove metadata_file from "
                "the dataset file"
            )


def read_captions(source: Path) -> tuple[list[CaptionEntry], ImageSet]:
    """The captions of the training images, and the image set. Excludes regularization images; decodes no pixels.

    If several images share a caption file, a new caption goes to a file for one image: `a.jpg.txt`, not `a.txt`.
    """
    image_set = read_set(source, decode=False)
    examples = list({example.image: example for example in image_set.examples}.values())  # a list can repeat a folder
    num_users = Counter(_file_key(_default_file(example)) for example in examples)
    origins: dict[Path, dict[tuple[str, str], Origin]] = {}
    entries = []
    for example in examples:
        if example.is_regularization:
            continue
        default = _default_file(example)
        is_shared = num_users[_file_key(default)] > 1
        target_file = example.image.with_name(f"{example.image.name}.txt") if is_shared else default
        caption_file, origin = None if _is_in_table(example) else example.sidecar, None
        if caption_file:
            folder = caption_file.parent
            if folder not in origins:
                origins[folder] = read_origins(folder)
            if origins[folder]:
                origin = origins[folder].get((caption_file.name, sha256(caption_file.read_bytes())))
        lines = lines_of(read_text(caption_file)) if caption_file else example.lines
        entry = CaptionEntry(example, target_file, caption_file, lines, _source(example), origin)
        entries.append(entry if origin is None else replace(entry, source="generated"))
    return entries, image_set


def _is_in_table(example: Example) -> bool:
    sidecar = example.sidecar
    return sidecar is not None and (sidecar.name.lower() in TABLES or _is_kohya_json(sidecar))


def _is_kohya_json(file: Path) -> bool:
    return file.suffix.lower() == ".json"


def _default_file(example: Example) -> Path:
    """The caption file that is read, or else the text file named after the image."""
    if example.sidecar is None or _is_in_table(example):
        return example.image.with_name(f"{example.image.stem}.txt")
    return example.sidecar


def _file_key(file: Path) -> tuple[Path, str]:
    """A key for comparing file names regardless of case."""
    return file.parent, folded(file.name)


def _source(example: Example) -> CaptionSource:
    if not example.lines:
        return "none"
    if example.sidecar is None:
        return "class words"
    return "table" if _is_in_table(example) else "manual"
