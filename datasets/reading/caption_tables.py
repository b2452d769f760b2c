"""Caption tables: `metadata.jsonl` or `metadata.csv` of Hugging Face's ImageFolder, and kohya's metadata JSON.

Each row has `file_name`, relative to the table, and a caption; see
https://huggingface.co/docs/datasets/image_dataset#imagefolder. Several rows for one file are the lines of its caption.
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
    """Caption lines by image path, and the problems found in individual rows."""

    path: Path
    lines: dict[str, tuple[str, ...]] = field(default_factory=dict)
    entries: dict[str, tuple[str, Path]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    found: set[str] = field(default_factory=set)

    def caption_lines(self, image: Path) -> tuple[str, ...] | None:
        """Return the caption lines of an image, listed with or without its suffix, or None if it is not listed."""
        for key in (_key(image), _key(image.with_suffix(""))):
            if key in self.lines:
                self.found.add(key)
                return self.lines[key]
        return None

    def missing(self) -> list[str]:
        """Return the listed names of files that do not exist; images passed to `caption_lines` do exist."""
        return [
            name
            for key, (name, path) in self.entries.items()
            if key not in self.found and not os.path.exists(path)  # noqa: PTH110  (Path.exists raises for long names)
        ]

    def folders(self) -> list[Path]:
        """Return the folders of the listed images, without duplicates."""
        return sorted({path.parent for _, path in self.entries.values()})

    def add(self, path: Path, name: str, lines: tuple[str, ...]) -> None:
        """Append caption lines for the image at `path`, which the table lists as `name`."""
        key = _key(path)
        self.entries[key] = (name, path)
        self.lines[key] = self.lines.get(key, ()) + lines


def read_table(path: Path) -> Table:
    """Read all valid rows. Raises `Refused` naming a table without any."""
    text, table = _text(path), Table(path)
    rows = _csv_rows(text, table) if path.suffix.lower() == ".csv" else _json_rows(text, table)
    for number, row in rows:
        name, caption = row.get(NAME_COLUMN), _caption(row)
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            table.problems.append(f"row {number} has no {NAME_COLUMN}")
        elif caption is None:
            table.problems.append(f"row {number} has no caption; expected a column {' or '.join(CAPTION_COLUMNS)}")
        else:
            name = name.replace("\\", "/")
            table.add(path.parent / name, name, lines_of(caption))
    if not table.lines:
        raise Refused(f"{path}: {table.problems[0] if table.problems else 'the table is empty'}")
    return table


def read_kohya_metadata(path: Path, folder: Path | None, tags_on_each_line: bool) -> Table:
    """Read kohya's metadata file: {image: {"caption": …, "tags": …}}, from finetune/merge_captions_to_metadata.py.

    An image is an existing path, or a name in `folder` with or without its suffix. Tags are appended to the caption:
    to its last line, or to each line. Raises `Refused` naming a file in another format.
    """
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path}: is not JSON ({error})") from None
    if not isinstance(content, dict) or not content:
        raise Refused(f"{path}: must be a JSON object of images with caption or tags, as kohya's scripts write it")
    table = Table(path)
    for name, entry in content.items():
        values = entry if isinstance(entry, dict) else {}
        caption, tags = (value if isinstance(value := values.get(key), str) else "" for key in ("caption", "tags"))
        if not caption and not tags:
            table.problems.append(f"{name} has neither caption nor tags")
        lines = lines_of(caption) or lines_of(tags)
        if caption and tags:
            joined_tags = ", ".join(lines_of(tags))
            first = len(lines) - 1 if not tags_on_each_line else 0
            lines = (*lines[:first], *(f"{line}, {joined_tags}" for line in lines[first:]))
        image = Path(name.replace("\\", "/"))
        inside = folder is not None and not image.is_absolute() and not image.exists()
        table.add(folder / image if inside and folder else image, name, lines)
    return table


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Refused(f"{path}: is over {MAX_BYTES // 1_000_000} MB, too large for a caption table; remove it")
        return decoded(path.read_bytes(), path)
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror})") from None


def _caption(row: dict[str, object]) -> str | None:
    """Return the caption of a row; the strings of a list are its lines."""
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
                table.problems.append(f"row {number} is not a JSON object")


def _csv_rows(text: str, table: Table) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield the rows of a CSV file. The delimiter is the one its header has most: comma, semicolon (Excel) or tab."""
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for number, row in enumerate(reader, 2):
            yield number, dict(row)
    except csv.Error as error:
        table.problems.append(f"row {reader.line_num} cannot be read ({error})")


def _key(path: Path) -> str:
    """Return one key per file: `.` and `..` resolved, links not followed, case and Unicode normalized."""
    return folded(os.path.normpath(path.absolute()))
