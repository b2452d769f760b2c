"""Edits over the caption files of a set. Each line of a file is edited as a caption of its own."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scumble.datasets.reading.sidecars import decoded

from .changes import Change
from .edits import Edit
from .texts import Text


@dataclass(frozen=True)
class Edited:
    """A caption file and what an edit makes of it. A caption from a table gets a file, which goes before the table."""

    file: Path
    before: str
    after: str


def edited(texts: Sequence[Text], edit: Edit, only: re.Pattern[str] | None = None) -> list[Edited]:
    """The files that change, of those in which `only` finds something. Pictures without a caption are passed over."""
    found: dict[Path, Edited] = {}
    for text in texts:
        if not text.is_caption:
            continue
        file = text.stands_in or text.file
        before = decoded(file.read_bytes(), file) if text.stands_in else "\n".join(text.lines) + "\n"
        if only and not only.search(before):
            continue
        after = "".join(_line(line, edit) for line in before.splitlines(keepends=True))
        if after != before:
            found[file] = Edited(file, before, after)
    return list(found.values())


def write(changes: Sequence[Edited], command: str) -> None:
    """Put every edited text in its file, as one change that can be taken back."""
    change = Change(command)
    for one in changes:
        change.put(one.file, one.after.encode())


def _line(line: str, edit: Edit) -> str:
    said = " ".join(line.split())
    if not said:
        return line
    changed = edit(said)
    return line if changed == said else changed + line[len(line.splitlines()[0]) :]
