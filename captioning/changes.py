"""Changes of caption files: written whole or not at all, told from a person's own, and taken back.

Beside the captions of a folder lies `.scumble/captions/`. Each change has a file there, named by its time in
nanoseconds: JSON lines, the first says what was done, each other names a file, the text before and the hash of the
text after. A line is written before its file is, so that a run that is cut can be taken back too. `written.jsonl`
holds the hash of every text that a captioner wrote: a caption with another hash is a person's.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scumble.configs.atomic import atomic_write
from scumble.configs.errors import Refused
from scumble.configs.exit_codes import CANNOT_WRITE

PLACE = Path(".scumble") / "captions"
WRITTEN = "written.jsonl"


@dataclass(frozen=True)
class Origin:
    """Who wrote a text that is ours: `request` stands for captioner, settings and picture.

    `mixed` says that words of a person are in it.
    """

    request: str
    mixed: bool


@dataclass(frozen=True)
class Before:
    """A file as a change found it (None: not there) and the hash that it left."""

    file: Path
    data: bytes | None
    after: str


class Change:
    """One change of caption files, over all their folders."""

    def __init__(self, command: str):
        self.command, self.number = command, time.time_ns()
        self.begun: set[Path] = set()

    def write(self, file: Path, text: str, origin: Origin | None = None) -> None:
        """Put `text` and a line's end into `file`; its folder remembers what was there."""
        self.put(file, (text + "\n").encode(), origin)

    def put(self, file: Path, data: bytes, origin: Origin | None = None) -> None:
        """Put `data` into `file`. Raises `Refused` (73) where that cannot be."""
        place, digest = file.parent / PLACE, hashed(data)
        try:
            before = file.read_bytes() if file.exists() else None
            if place not in self.begun:
                place.mkdir(parents=True, exist_ok=True)
                when = datetime.fromtimestamp(self.number / 1e9, UTC).isoformat(timespec="seconds")
                append(place / f"{self.number}.jsonl", {"did": self.command, "when": when})
                self.begun.add(place)
            if origin:
                told = {"file": file.name, "sha256": digest, "request": origin.request, "mixed": origin.mixed}
                append(place / WRITTEN, told)
            line = {"file": file.name, "before": None if before is None else as_text(before), "after": digest}
            append(place / f"{self.number}.jsonl", line)
            replace_file(file, data)
        except OSError as error:
            raise Refused(f"{error.filename or file} cannot be written ({error.strerror})", CANNOT_WRITE) from None


def hashed(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def as_text(data: bytes) -> str:
    """Any bytes as text; `as_bytes` gives them back, those that are not UTF-8 too."""
    return data.decode("utf-8", "surrogateescape")


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def append(path: Path, line: dict[str, Any]) -> None:
    """One JSON object more in a file of lines."""
    with path.open("ab") as file:
        file.write(json.dumps(line).encode() + b"\n")


def replace_file(file: Path, data: bytes) -> None:
    """Write a file atomically. A link stays a link, and the permissions stay. Raises `Refused` (73)."""
    target = file.resolve()
    with atomic_write(target) as temporary:
        temporary.write_bytes(data)
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o7777)


def written_in(folder: Path) -> dict[tuple[str, str], Origin]:
    """(name of a file, hash of its text) -> who wrote that, for every text that captioners wrote in a folder."""
    return {
        (str(line.get("file")), str(line.get("sha256"))): Origin(str(line.get("request")), bool(line.get("mixed")))
        for line in log_lines(folder / PLACE / WRITTEN)
    }


def undo(roots: Sequence[Path], overwrite: bool) -> tuple[str, list[Path]]:
    """Take back the latest change at or below these folders: what it did, and the files that are as before.

    Raises `Refused` where there is none, or a file was changed since by other means, unless `overwrite`.
    """
    logs = sorted({log for root in roots for log in logs_below(root)}, key=lambda path: int(path.stem))
    if not logs:
        raise Refused(f"{roots[0]}: no change of captions to take back")
    latest = [log for log in logs if log.stem == logs[-1].stem]
    told, befores = "", []
    for log in latest:
        did, found = read_log(log)
        told, befores = told or did, befores + found
    now = {one.file: one.file.read_bytes() if one.file.exists() else None for one in befores}
    moved = [one for one in befores if now[one.file] != one.data]
    other = [one.file for one in moved if (data := now[one.file]) is None or hashed(data) != one.after]
    if other and not overwrite:
        more = f" and {len(other) - 1} more" if len(other) > 1 else ""
        raise Refused(f"{other[0]}{more} was changed since ({told}): --overwrite takes it back all the same")
    try:
        for one in moved:
            if one.data is None:
                one.file.unlink(missing_ok=True)
            else:
                replace_file(one.file, one.data)
        for log in latest:
            log.unlink()
    except OSError as error:
        raise Refused(f"{error.filename} cannot be written ({error.strerror})", CANNOT_WRITE) from None
    return told, [one.file for one in moved]


def logs_below(root: Path) -> Iterator[Path]:
    """The file of every change in every folder at or below `root`, links followed, each folder once."""
    seen: set[tuple[int, int]] = set()
    for place, folders, _ in os.walk(root, followlinks=True):
        status = Path(place).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (path for path in (Path(place) / PLACE).glob("*.jsonl") if path.stem.isdigit())


def read_log(log: Path) -> tuple[str, list[Before]]:
    """What a change did, and every file as it found it; of a file that it wrote twice, the first and the last."""
    folder, did, found = log.parents[2], "", {}
    for line in log_lines(log):
        if "did" in line:
            did = str(line["did"])
        elif file := line.get("file"):
            text, path = line.get("before"), folder / str(file)
            data = found[path].data if path in found else None if text is None else as_bytes(str(text))
            found[path] = Before(path, data, str(line.get("after")))
    return did, list(found.values())


def log_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line that was cut is none."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            one = json.loads(line)
        except ValueError:
            continue
        if isinstance(one, dict):
            yield one
