"""Captions in a table: `metadata.jsonl` or `metadata.csv`, as Hugging Face's imagefolder has them, or kohya's JSON.

Each row has `file_name`, relative to the table, and a caption; see
https://huggingface.co/docs/datasets/image_dataset#imagefolder. Several rows of one file are its several captions.
"""

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scumble.configs.errors import Refused

from .sidecars import decoded, folded, lines_of

NAME_COLUMN = "file_name"
CAPTION_COLUMNS = ("text", "caption", "prompt", "description")
MAX_BYTES = 500_000_000


@dataclass(eq=False)
class Table:
    """Lines of captions by the picture's path, and what is wrong with the table, row by row."""

    path: Path
    lines: dict[str, tuple[str, ...]] = field(default_factory=dict)
    named: dict[str, tuple[str, Path]] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)
    found: set[str] = field(default_factory=set)

    def of(self, image: Path) -> tuple[str, ...] | None:
        """The caption of a picture, which is named with its suffix or without; nothing where no row names it."""
        for key in (_key(image), _key(image.with_suffix(""))):
            if key in self.lines:
                self.found.add(key)
                return self.lines[key]
        return None

    def missing(self) -> list[str]:
        """Names in the table of files that are not there; those that `of` was asked for are."""
        return [
            name
            for key, (name, path) in self.named.items()
            if key not in self.found and not os.path.exists(path)  # noqa: PTH110  (a name too long is missing too)
        ]

    def folders(self) -> list[Path]:
        """The folders of the pictures that it names, each once."""
        return sorted({path.parent for _, path in self.named.values()})

    def add(self, path: Path, name: str, lines: tuple[str, ...]) -> None:
        """Further lines for the picture at `path`, which the table calls `name`."""
        key = _key(path)
        self.named[key] = (name, path)
        self.lines[key] = self.lines.get(key, ()) + lines


def read_table(path: Path) -> Table:
    """The rows that can be read. Raises `Refused` naming a table of which none can be."""
    text, table = _text(path), Table(path)
    rows = _csv_rows(text, table) if path.suffix.lower() == ".csv" else _json_rows(text, table)
    for number, row in rows:
        name, caption = row.get(NAME_COLUMN), _caption(row)
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            table.troubles.append(f"row {number} has no {NAME_COLUMN}")
        elif caption is None:
            table.troubles.append(f"row {number} has no caption; its column is named {', '.join(CAPTION_COLUMNS)}")
        else:
            name = name.replace("\\", "/")
            table.add(path.parent / name, name, lines_of(caption))
    if not table.lines:
        raise Refused(f"{path}: {table.troubles[0] if table.troubles else 'it is empty'}")
    return table


def read_kohyas(path: Path, folder: Path | None, tags_to_each_line: bool) -> Table:
    """kohya's metadata file: {picture: {"caption": …, "tags": …}}, as finetune/merge_captions_to_metadata.py writes it.

    A picture is a path that is there, or a name in `folder`, with its suffix or without. Tags stand behind the
    caption, or behind each line of it. Raises `Refused` naming a file that is none such.
    """
    try:
        told = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path} is not JSON ({error})") from None
    if not isinstance(told, dict) or not told:
        raise Refused(f"{path}: must be an object of pictures with caption or tags, as kohya's scripts write it")
    table = Table(path)
    for name, entry in told.items():
        values = entry if isinstance(entry, dict) else {}
        caption, tags = (value if isinstance(value := values.get(key), str) else "" for key in ("caption", "tags"))
        if not caption and not tags:
            table.troubles.append(f"{name} has neither caption nor tags")
        lines = lines_of(caption) or lines_of(tags)
        if caption and tags:
            behind = ", ".join(lines_of(tags))
            first = len(lines) - 1 if not tags_to_each_line else 0
            lines = (*lines[:first], *(f"{line}, {behind}" for line in lines[first:]))
        place = Path(name.replace("\\", "/"))
        inside = folder is not None and not place.is_absolute() and not place.exists()
        table.add(folder / place if inside and folder else place, name, lines)
    return table


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Refused(f"{path} is over {MAX_BYTES // 1_000_000} MB, so it is no table of captions: take it out")
        return decoded(path.read_bytes(), path)
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})") from None


def _caption(row: dict[str, object]) -> str | None:
    """The caption of a row; a list of texts is several captions."""
    lowered = {key.lower(): value for key, value in row.items() if isinstance(key, str)}
    for column in CAPTION_COLUMNS:
        value = lowered.get(column)
        if isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(line, str) for line in value):
            return "\n".join(map(str, value))
    return None


def _json_rows(text: str, table: Table) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield number, row
            else:
                table.troubles.append(f"row {number} is not a JSON object")


def _csv_rows(text: str, table: Table) -> Iterator[tuple[int, dict[str, object]]]:
    """Rows of a file whose columns are parted by comma, semicolon (some Excels) or tab, whichever names the columns."""
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for number, row in enumerate(reader, 2):
            yield number, dict(row)
    except csv.Error as error:
        table.troubles.append(f"row {reader.line_num} cannot be read ({error})")


def _key(path: Path) -> str:
    """A path by which one file is found alike: `.` and `..` resolved, links not followed, one Unicode form."""
    return folded(os.path.normpath(path.absolute()))
