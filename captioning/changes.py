"""Changes to caption files: atomic, recorded, and undoable.

Each folder of captions has a folder `.scumble/captions/`. Every change adds one JSON lines file there, named by its
time in nanoseconds. The first line is the command; each other line is a file name, the text before the change and the
hash of the text after it. The line is written before the file, so an interrupted change can be undone too.
`written.jsonl` holds the hash of every text that a captioner wrote: a caption with any other hash was written or
edited by a person.
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

from scumble.configs.atomic import atomic_write, cannot_write
from scumble.configs.errors import Refused

HISTORY_FOLDER = Path(".scumble") / "captions"
WRITTEN_FILE = "written.jsonl"


@dataclass(frozen=True)
class Origin:
    """How a generated caption was made: `request` is the fingerprint of captioner, settings and image.

    `mixed` is True if the caption also contains text written by a person.
    """

    request: str
    mixed: bool


@dataclass(frozen=True)
class UndoEntry:
    """The content of a file before a change (None: it did not exist), and the hash of its content afterwards."""

    file: Path
    before: bytes | None
    hash_after: str


class Change:
    """One change to caption files, in one or several folders."""

    def __init__(self, command: str):
        self.command, self.time_ns = command, time.time_ns()
        self.started: set[Path] = set()

    def write_text(self, file: Path, text: str, origin: Origin | None = None) -> None:
        """Write `text` and a line break to `file`, and record its previous content."""
        self.write_bytes(file, (text + "\n").encode(), origin)

    def write_bytes(self, file: Path, data: bytes, origin: Origin | None = None) -> None:
        """Write `data` to `file`, and record its previous content. Raises `Refused` (73) if that fails."""
        history, digest = file.parent / HISTORY_FOLDER, sha256(data)
        try:
            before = file.read_bytes() if file.exists() else None
            if history not in self.started:
                history.mkdir(parents=True, exist_ok=True)
                when = datetime.fromtimestamp(self.time_ns / 1e9, UTC).isoformat(timespec="seconds")
                append(history / f"{self.time_ns}.jsonl", {"command": self.command, "time": when})
                self.started.add(history)
            if origin:
                line = {"file": file.name, "sha256": digest, "request": origin.request, "mixed": origin.mixed}
                append(history / WRITTEN_FILE, line)
            line = {"file": file.name, "before": None if before is None else as_text(before), "after": digest}
            append(history / f"{self.time_ns}.jsonl", line)
            replace_file(file, data)
        except OSError as error:
            raise cannot_write(Path(error.filename or file), error) from None


def sha256(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def as_text(data: bytes) -> str:
    """Decode any bytes, including invalid UTF-8; `as_bytes` restores them."""
    return data.decode("utf-8", "surrogateescape")


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def append(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON object to a JSON lines file."""
    with path.open("ab") as file:
        file.write(json.dumps(line).encode() + b"\n")


def replace_file(file: Path, data: bytes) -> None:
    """Write a file atomically, keeping symlinks and permissions. Raises `Refused` (73) if that fails."""
    target = file.resolve()
    with atomic_write(target) as temporary:
        temporary.write_bytes(data)
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o7777)


def read_origins(folder: Path) -> dict[tuple[str, str], Origin]:
    """(file name, hash of its text) -> origin, for every text that captioners wrote in a folder."""
    return {
        (str(line.get("file")), str(line.get("sha256"))): Origin(str(line.get("request")), bool(line.get("mixed")))
        for line in read_lines(folder / HISTORY_FOLDER / WRITTEN_FILE)
    }


def undo(roots: Sequence[Path], overwrite: bool) -> tuple[str, list[Path]]:
    """Undo the latest change in or below these folders; returns its command and the restored files.

    Raises `Refused` if there is no change to undo. Unless `overwrite` is set, also raises `Refused` if a file was
    edited after the change.
    """
    logs = sorted({log for root in roots for log in logs_below(root)}, key=lambda path: int(path.stem))
    if not logs:
        raise Refused(f"{roots[0]}: no caption changes to undo")
    latest = [log for log in logs if log.stem == logs[-1].stem]
    command, entries = "", []
    for log in latest:
        log_command, log_entries = read_log(log)
        command, entries = command or log_command, entries + log_entries
    current = {entry.file: entry.file.read_bytes() if entry.file.exists() else None for entry in entries}
    changed = [entry for entry in entries if current[entry.file] != entry.before]
    edited = [e.file for e in changed if (data := current[e.file]) is None or sha256(data) != e.hash_after]
    if edited and not overwrite:
        more = f" and {len(edited) - 1} more" if len(edited) > 1 else ""
        raise Refused(f"{edited[0]}{more}: edited after `{command}`; --overwrite undoes it anyway")
    try:
        for entry in changed:
            if entry.before is None:
                entry.file.unlink(missing_ok=True)
            else:
                replace_file(entry.file, entry.before)
        for log in latest:
            log.unlink()
    except OSError as error:
        raise cannot_write(Path(error.filename or roots[0]), error) from None
    return command, [entry.file for entry in changed]


def logs_below(root: Path) -> Iterator[Path]:
    """The log of every change in or below `root`; follows symlinks and visits each folder once."""
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, _ in os.walk(root, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (path for path in (Path(folder) / HISTORY_FOLDER).glob("*.jsonl") if path.stem.isdigit())


def read_log(log: Path) -> tuple[str, list[UndoEntry]]:
    """The command of a change and its files; a file written twice has its first `before` and its last hash."""
    folder, command, entries = log.parents[2], "", {}
    for line in read_lines(log):
        if "command" in line:
            command = str(line["command"])
        elif name := line.get("file"):
            text, path = line.get("before"), folder / str(name)
            before = entries[path].before if path in entries else None if text is None else as_bytes(str(text))
            entries[path] = UndoEntry(path, before, str(line.get("after")))
    return command, list(entries.values())


def read_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The objects in a JSON lines file; skips a truncated last line."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value
