"""The folder of one run: who owns it, how it ended, whether it lives, and what is asked of it while it runs.

All of it is small files, so that any program on any machine can tell: `owner.json` (token, process, host),
`heartbeat.json` (time, step), `exit.json` (code, reason, step, host), `requests/` (sample, save, stop). The state of a
run is computed from them, never stored.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from scumble.configs.atomic import atomic_write, cannot_write
from scumble.configs.errors import Refused
from scumble.configs.exit_codes import CANNOT_WRITE, DONE, INTERRUPTED, RESUMABLE

from ..system.signals import Interrupted

OWNER, HEARTBEAT, EXIT, REQUESTS = "owner.json", "heartbeat.json", "exit.json", "requests"
ROOM, ROOM_BYTES = "exit.json.room", 4096  # kept for the exit record, which a full disk must not prevent
OPTIONS, EVENTS = "options.toml", "events.jsonl"
FORMAT = 1  # of a run folder and the states in it; a release resumes the runs of the release before it
KINDS_OF_REQUEST = ("sample", "save", "stop")
BEAT_S, LOST_AFTER_S = 5.0, 300.0


@dataclass(frozen=True)
class Status:
    """`state` is running, done, stopped (it can go on), failed, or lost (its process ended without a word)."""

    state: str
    reason: str
    step: int
    num_steps: int


class TakenOver(Refused):
    """Another process owns the run now."""


class RunFolder:
    """A claimed run folder. As a context it writes `exit.json` when it is left, whatever happened."""

    def __init__(self, path: Path):
        self.path = path
        self.token = uuid.uuid4().hex
        self.step, self.num_steps = 0, 0
        self.code, self.reason = DONE, "finished"
        self.beaten = float("-inf")

    def claim(self, force: bool = False) -> Self:
        """Make the folder where there is none, and this process its owner.

        Raises `Refused` (73) where it cannot be made, (75) where a living process owns it and `force` is false.
        """
        if self.path.exists() and not force and status_of(self.path).state == "running":
            owner = read_json(self.path / OWNER)
            raise Refused(
                f"{self.path}: is being trained by process {owner.get('pid')} on {owner.get('host')}; "
                f"`scumble stop {self.path}` ends it",
                RESUMABLE,
            )
        try:
            (self.path / REQUESTS).mkdir(parents=True, exist_ok=True)
            for kind in KINDS_OF_REQUEST:
                (self.path / REQUESTS / kind).unlink(missing_ok=True)
        except OSError as error:
            what = "written" if self.path.is_dir() else "made"
            raise Refused(
                f"--output-dir {self.path.parent}: {self.path} cannot be {what} ({error.strerror or error})", 73
            ) from None
        owner = {
            "format": FORMAT,
            "token": self.token,
            "pid": os.getpid(),
            "born": born(os.getpid()),
            "host": socket.gethostname(),
        }
        before = status_of(self.path)
        write_json(self.path / OWNER, owner)
        write_text(self.path / ROOM, " " * ROOM_BYTES)
        self.beat(before.step, before.num_steps)
        (self.path / EXIT).unlink(missing_ok=True)
        return self

    def check_owner(self) -> None:
        """Raises `Refused` (75) where another process has taken the run over: then nothing more is written."""
        owner = read_json(self.path / OWNER)
        if owner.get("token") != self.token:
            what = "another process has taken this run over" if owner else f"{OWNER} has gone or cannot be read"
            raise TakenOver(f"{self.path}: {what}; this process stops and writes nothing more", RESUMABLE)

    def beat(self, step: int, num_steps: int) -> None:
        """Say that the run lives: at once where its length is another than before, else at most every few seconds."""
        due = num_steps != self.num_steps or time.monotonic() - self.beaten > BEAT_S
        self.step, self.num_steps = step, num_steps
        if due:
            self.beaten = time.monotonic()
            self.check_owner()
            write_json(self.path / HEARTBEAT, {"t": time.time(), "step": step, "num_steps": num_steps})

    @property
    def is_asked(self) -> bool:
        """Whether there are requests."""
        try:
            return any(path.name in KINDS_OF_REQUEST for path in (self.path / REQUESTS).iterdir())
        except OSError:
            return False

    def requests(self) -> set[str]:
        """What was asked since the last time, each once."""
        found = set()
        with suppress(OSError):
            for path in (self.path / REQUESTS).iterdir():
                if path.name in KINDS_OF_REQUEST:
                    path.unlink(missing_ok=True)
                    found.add(path.name)
        return found

    def stopped(self, code: int, reason: str) -> None:
        """How the run will have ended."""
        self.code, self.reason = code, reason

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Refused):
            self.stopped(error.exit_code, str(error))
        elif isinstance(error, Interrupted):
            self.stopped(error.code, f"stopped by {error.by}")
        elif error is not None:
            self.stopped(1, f"{type(error).__name__}: {error}")
        told = {"code": self.code, "reason": self.reason, "step": self.step, "num_steps": self.num_steps}
        try:
            self.check_owner()
            self._record(told | {"host": socket.gethostname(), "t": time.time()})
        except TakenOver:
            pass
        except Refused:  # what cannot be written must not hide what happened; without its owner no run seems to live
            with suppress(OSError):
                (self.path / OWNER).unlink()

    def _record(self, told: Mapping[str, Any]) -> None:
        """Write the exit record into the room that is kept for it."""
        room, text = self.path / ROOM, json.dumps(told, ensure_ascii=False) + "\n"
        try:
            with room.open("r+b") as file:
                file.write(text.encode())
                file.truncate()
            room.replace(self.path / EXIT)
        except OSError:
            write_text(self.path / EXIT, text)


def name_of_set(images: str) -> str:
    """What a run is called after: the folder of pictures, or the file that lists folders."""
    path = Path(images).resolve()
    return path.stem if path.is_file() else path.name


def is_run(folder: Path) -> bool:
    """Whether `folder` is one that a run left or is in."""
    return (folder / OPTIONS).is_file() and (folder / EVENTS).is_file()


def check_format(folder: Path) -> None:
    """Raises `Refused` where a run cannot be resumed because another version of scumble wrote it."""
    found = read_json(folder / OWNER).get("format")
    if found != FORMAT:
        version = f"format {found}" if found else "no format number, from before the first release"
        raise Refused(f"{folder}: a run of another version of scumble ({version}, this one reads {FORMAT}); train anew")


def status_of(folder: Path) -> Status:
    """What is true of a run now: its exit record; else its process, or on another host a fresh heartbeat; else lost."""
    beat, ended, owner = (read_json(folder / name) for name in (HEARTBEAT, EXIT, OWNER))
    step, num_steps = int(beat.get("step", 0)), int(beat.get("num_steps", 0))
    if ended:
        code = ended.get("code")
        state = "done" if code == DONE else "stopped" if code in (RESUMABLE, INTERRUPTED, CANNOT_WRITE) else "failed"
        return Status(
            state, str(ended.get("reason", "")), int(ended.get("step", step)), int(ended.get("num_steps", num_steps))
        )
    if not owner:
        lives = False
    elif owner.get("host") == socket.gethostname():
        lives = owner.get("born") is not None and born(int(owner.get("pid", 0))) == owner["born"]
    else:
        lives = abs(time.time() - float(beat.get("t", 0))) < LOST_AFTER_S
    if lives:
        return Status("running", f"process {owner.get('pid')} on {owner.get('host')}", step, num_steps)
    return Status("lost", f"its process ended without a word; `scumble train {folder}` goes on", step, num_steps)


def request(folder: Path, kind: str) -> None:
    """Ask a living run for `kind`: sample, save or stop. `Refused` where it does not live, or (73) cannot be asked."""
    if not is_run(folder):
        raise Refused(f"{folder}: no folder of a run; they lie in runs/")
    if (status := status_of(folder)).state != "running":
        raise Refused(f"{folder}: the run is {status.state} ({status.reason}), so there is nothing to {kind}")
    try:
        (folder / REQUESTS / kind).touch()
    except OSError as error:
        raise cannot_write(folder / REQUESTS, error) from None


def born(pid: int) -> str | None:
    """When a process started, in a form that no change of the clock touches; None where there is no such process."""
    import psutil

    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        ticks = stat.rpartition(")")[2].split()[19]  # since the machine started (proc(5), field 22)
        return None if stat.rpartition(")")[2].split()[0] == "Z" else ticks
    except OSError:
        pass  # no /proc on macOS and Windows
    try:
        return f"{psutil.Process(pid).create_time():.0f}"
    except psutil.Error:
        return None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where it is not there or not whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object atomically. Raises `Refused` (73) where it cannot be written."""
    write_text(path, json.dumps(content, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises `Refused` (73) where it cannot be written."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
