"""The folder of a run: its owner, its status, its exit record, and requests to the running process.

All of this is in small files that any program on any machine can read: `owner.json` (token, process, host),
`heartbeat.json` (time, step), `exit.json` (code, reason, step, host), `requests/` (sample, save, stop). The status of
a run is computed from them and never stored.
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
RESERVED, RESERVED_BYTES = "exit.json.room", 4096  # for the exit record, which a full disk must not prevent
OPTIONS, EVENTS = "options.toml", "events.jsonl"
FORMAT = 1  # of run folders and their states; a release can resume runs of the previous release
REQUEST_KINDS = ("sample", "save", "stop")
HEARTBEAT_S, LOST_AFTER_S = 5.0, 300.0


@dataclass(frozen=True)
class Status:
    """`state` is running, done, stopped (resumable), failed, or lost (the process died without an exit record)."""

    state: str
    reason: str
    step: int
    num_steps: int


class TakenOver(Refused):
    """Another process owns the run now."""


class RunFolder:
    """A run folder owned by this process. As a context manager, it writes `exit.json` on exit, even after errors."""

    def __init__(self, path: Path):
        self.path = path
        self.token = uuid.uuid4().hex
        self.step, self.num_steps = 0, 0
        self.code, self.reason = DONE, "finished"
        self.last_beat = float("-inf")

    def claim(self, force: bool = False) -> Self:
        """Create the folder if needed, and make this process its owner.

        Raises `Refused` (73) if it cannot be created, and (75) if a running process owns it and `force` is false.
        """
        if self.path.exists() and not force and status_of(self.path).state == "running":
            owner = read_json(self.path / OWNER)
            raise Refused(
                f"{self.path}: process {owner.get('pid')} on {owner.get('host')} is training this run; stop it with "
                f"`scumble stop {self.path}`",
                RESUMABLE,
            )
        try:
            (self.path / REQUESTS).mkdir(parents=True, exist_ok=True)
            for kind in REQUEST_KINDS:
                (self.path / REQUESTS / kind).unlink(missing_ok=True)
        except OSError as error:
            action = "written" if self.path.is_dir() else "created"
            raise Refused(
                f"--output-dir {self.path.parent}: {self.path} cannot be {action} ({error.strerror or error})",
                CANNOT_WRITE,
            ) from None
        owner = {
            "format": FORMAT,
            "token": self.token,
            "pid": os.getpid(),
            "born": process_start(os.getpid()),
            "host": socket.gethostname(),
        }
        before = status_of(self.path)
        write_json(self.path / OWNER, owner)
        write_text(self.path / RESERVED, " " * RESERVED_BYTES)
        self.beat(before.step, before.num_steps)
        (self.path / EXIT).unlink(missing_ok=True)
        return self

    def check_owner(self) -> None:
        """Raises `TakenOver` (75) if another process took over the run. Then this process must not write anything."""
        owner = read_json(self.path / OWNER)
        if owner.get("token") != self.token:
            problem = "another process took over this run" if owner else f"{OWNER} is missing or cannot be read"
            raise TakenOver(f"{self.path}: {problem}; this process stops and writes no more files", RESUMABLE)

    def beat(self, step: int, num_steps: int) -> None:
        """Update the heartbeat: immediately if `num_steps` changed, otherwise at most every few seconds."""
        is_due = num_steps != self.num_steps or time.monotonic() - self.last_beat > HEARTBEAT_S
        self.step, self.num_steps = step, num_steps
        if is_due:
            self.last_beat = time.monotonic()
            self.check_owner()
            write_json(self.path / HEARTBEAT, {"t": time.time(), "step": step, "num_steps": num_steps})

    @property
    def has_requests(self) -> bool:
        """Whether requests are pending."""
        try:
            return any(path.name in REQUEST_KINDS for path in (self.path / REQUESTS).iterdir())
        except OSError:
            return False

    def requests(self) -> set[str]:
        """Return the pending requests and remove them."""
        found = set()
        with suppress(OSError):
            for path in (self.path / REQUESTS).iterdir():
                if path.name in REQUEST_KINDS:
                    path.unlink(missing_ok=True)
                    found.add(path.name)
        return found

    def set_exit(self, code: int, reason: str) -> None:
        """Set the exit code and the reason for the exit record."""
        self.code, self.reason = code, reason

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Refused):
            self.set_exit(error.exit_code, str(error))
        elif isinstance(error, Interrupted):
            self.set_exit(error.code, f"stopped by {error.by}")
        elif error is not None:
            self.set_exit(1, f"{type(error).__name__}: {error}")
        record = {"code": self.code, "reason": self.reason, "step": self.step, "num_steps": self.num_steps}
        try:
            self.check_owner()
            self._write_record(record | {"host": socket.gethostname(), "t": time.time()})
        except TakenOver:
            pass
        except Refused:  # must not hide the original error; without an owner the run does not appear to be running
            with suppress(OSError):
                (self.path / OWNER).unlink()

    def _write_record(self, record: Mapping[str, Any]) -> None:
        """Write the exit record into the space reserved for it."""
        reserved, text = self.path / RESERVED, json.dumps(record, ensure_ascii=False) + "\n"
        try:
            with reserved.open("r+b") as file:
                file.write(text.encode())
                file.truncate()
            reserved.replace(self.path / EXIT)
        except OSError:
            write_text(self.path / EXIT, text)


def name_of_set(images: str) -> str:
    """The default name of a run: that of the image folder, or of the file that lists folders."""
    path = Path(images).resolve()
    return path.stem if path.is_file() else path.name


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run folder."""
    return (folder / OPTIONS).is_file() and (folder / EVENTS).is_file()


def check_format(folder: Path) -> None:
    """Raises `Refused` if another version of scumble wrote the run, so that it cannot be resumed."""
    found = read_json(folder / OWNER).get("format")
    if found != FORMAT:
        version = f"format {found}" if found else "no format number, older than the first release"
        raise Refused(
            f"{folder}: written by another version of scumble ({version}; expected format {FORMAT}); start a new run"
        )


def status_of(folder: Path) -> Status:
    """Compute the status from the exit record, else from the process or, on another host, from the heartbeat."""
    beat, ended, owner = (read_json(folder / name) for name in (HEARTBEAT, EXIT, OWNER))
    step, num_steps = int(beat.get("step", 0)), int(beat.get("num_steps", 0))
    if ended:
        code = ended.get("code")
        state = "done" if code == DONE else "stopped" if code in (RESUMABLE, INTERRUPTED, CANNOT_WRITE) else "failed"
        return Status(
            state, str(ended.get("reason", "")), int(ended.get("step", step)), int(ended.get("num_steps", num_steps))
        )
    if not owner:
        is_alive = False
    elif owner.get("host") == socket.gethostname():
        is_alive = owner.get("born") is not None and process_start(int(owner.get("pid", 0))) == owner["born"]
    else:
        is_alive = abs(time.time() - float(beat.get("t", 0))) < LOST_AFTER_S
    if is_alive:
        return Status("running", f"process {owner.get('pid')} on {owner.get('host')}", step, num_steps)
    return Status("lost", f"process died (no exit record); resume with `scumble train {folder}`", step, num_steps)


def request(folder: Path, kind: str) -> None:
    """Send a request to a run: sample, save or stop. Raises `Refused` if it is not running, (73) if this fails."""
    if not is_run(folder):
        raise Refused(f"{folder}: not a run folder; runs are in runs/")
    if (status := status_of(folder)).state != "running":
        raise Refused(f"{folder}: cannot {kind}; the run is {status.state}: {status.reason}")
    try:
        (folder / REQUESTS / kind).touch()
    except OSError as error:
        raise cannot_write(folder / REQUESTS, error) from None


def process_start(pid: int) -> str | None:
    """The start time of a process, independent of clock changes, or None if there is no such process."""
    import psutil

    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        ticks = stat.rpartition(")")[2].split()[19]  # since boot (proc(5), field 22)
        return None if stat.rpartition(")")[2].split()[0] == "Z" else ticks
    except OSError:
        pass  # no /proc on macOS and Windows
    try:
        return f"{psutil.Process(pid).create_time():.0f}"
    except psutil.Error:
        return None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Returns an empty one if the file is missing or invalid."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically. Raises `Refused` (73) if it cannot be written."""
    write_text(path, json.dumps(content, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises `Refused` (73) if it cannot be written."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
