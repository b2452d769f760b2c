"""Files written whole or not at all: under a temporary name in the same folder, then renamed."""

import os
import secrets
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import Refused
from .exit_codes import CANNOT_WRITE

IS_WINDOWS = os.name == "nt"
RENAME_TRIES, RENAME_PAUSE_S = 20, 0.05  # on Windows, a rename fails while another program reads the target


@contextmanager
def atomic_write(path: Path, sync: bool = False) -> Generator[Path]:
    """Yield a temporary path to write to; it replaces `path` when the block ends, and is removed if the block fails.

    The folder of `path` is created. With `sync`, the content is on the disk before the rename. Raises `Refused` (73)
    where the file cannot be written.
    """
    temporary = temporary_name(path)
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if sync:
                with temporary.open("r+b") as file:
                    os.fsync(file.fileno())
            replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other writer uses, and that fits where `path` fits."""
    return path.with_name(f".{path.name[:50]}.{os.getpid()}-{secrets.token_hex(4)}.part")


def replace(temporary: Path, path: Path) -> None:
    """Rename over `path`, waiting up to a second for other programs to close it (Windows)."""
    for tries_left in reversed(range(RENAME_TRIES)):
        try:
            temporary.replace(path)
            return
        except PermissionError:
            if not IS_WINDOWS or not tries_left:
                raise
            time.sleep(RENAME_PAUSE_S)


def replace_folder(temporary: Path, path: Path) -> None:
    """Rename a folder to `path`. What was there is moved aside first and removed last, so one of the two always exists.

    Raises `OSError` where that fails; then the old folder is back.
    """
    aside = temporary_name(path)
    if path.exists():
        path.rename(aside)
    try:
        temporary.rename(path)
    except OSError:
        if aside.exists():
            aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def cannot_write(path: Path, error: OSError) -> Refused:
    """The refusal of a path that cannot be written, with the system's reason."""
    return Refused(f"{path}: cannot be written ({error.strerror or error})", CANNOT_WRITE)
