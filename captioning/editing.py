"""Edits to the caption files of an image set. Each line of a file is edited as a separate caption."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scumble.datasets.reading.sidecars import decoded

from .changes import Change
from .edits import Edit
from .texts import CaptionEntry


@dataclass(frozen=True)
class EditedFile:
    """A caption file before and after an edit. A caption from a table goes to a new file, which overrides the table."""

    file: Path
    before: str
    after: str


def edited(entries: Sequence[CaptionEntry], edit: Edit, only: re.Pattern[str] | None = None) -> list[EditedFile]:
    """The files that `edit` changes, among those in which `only` matches. Skips images without a caption."""
    changes: dict[Path, EditedFile] = {}
    for entry in entries:
        if not entry.has_caption:
            continue
        source = entry.caption_file
        before = decoded(source.read_bytes(), source) if source else "\n".join(entry.lines) + "\n"
        if only and not only.search(before):
            continue
        after = "".join(_edit_line(line, edit) for line in before.splitlines(keepends=True))
        if after != before:
            file = source or entry.target_file
            changes[file] = EditedFile(file, before, after)
    return list(changes.values())


def write(changes: Sequence[EditedFile], command: str) -> None:
    """Write every edited file, as one change that can be undone."""
    change = Change(command)
    for one in changes:
        change.write_bytes(one.file, one.after.encode())


def _edit_line(line: str, edit: Edit) -> str:
    text = " ".join(line.split())
    if not text:
        return line
    changed = edit(text)
    return line if changed == text else changed + line[len(line.splitlines()[0]) :]
