"""Captions in a table: `metadata.jsonl` or `metadata.csv`, as Hugging Face's imagefolder has them.

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


@dataclass
class Table:
    """Lines of captions by the picture's path, and what is wrong with the table, row by row."""

    path: Path
    lines: dict[str, tuple[str, ...]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)

    def of(self, image: Path) -> tuple[str, ...] | None:
        """The caption of a picture, or nothing where no row names it."""
        return self.lines.get(_key(image))

    def missing(self) -> list[str]:
        """Names in the table of files that are not there."""
        return [name for name in self.names.values() if not os.path.exists(self.path.parent / name)]  # noqa: PTH110  (a name too long is missing too)


def read_table(path: Path) -> Table:
    """The rows that can be read. Raises `Refused` naming a table of which none can be."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Refused(f"{path} is over {MAX_BYTES // 1_000_000} MB, so it is no table of captions: take it out")
        text = decoded(path.read_bytes(), path)
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})") from None
    table = Table(path)
    rows = _csv_rows(text, table) if path.suffix.lower() == ".csv" else _json_rows(text, table)
    for number, row in rows:
        name, caption = row.get(NAME_COLUMN), _caption(row)
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            table.troubles.append(f"row {number} has no {NAME_COLUMN}")
        elif caption is None:
            table.troubles.append(f"row {number} has no caption; its column is named {', '.join(CAPTION_COLUMNS)}")
        else:
            key = _key(path.parent / name.replace("\\", "/"))
            table.names[key] = name.replace("\\", "/")
            table.lines[key] = table.lines.get(key, ()) + lines_of(caption)
    if not table.lines:
        raise Refused(f"{path}: {table.troubles[0] if table.troubles else 'it is empty'}")
    return table


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
