"""Where a result may be written: asked before the work begins, which may take long."""

import errno
import os
import shutil
from pathlib import Path

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import CANNOT_WRITE

from .formatting import format_bytes


def check_out(out: Path, suffix: str, force: bool, *sources: Path) -> None:
    """Raises `Refused` for a place that would be refused after the work, and for one of the files that are read."""
    if out.suffix != suffix:
        raise Refused(f"--out {out}: give a name that ends in {suffix}")
    check_place(out, *sources)
    if out.is_dir():
        raise Refused(f"--out {out}: is a folder; choose another name")
    if out.exists() and not force:
        raise Refused(f"{out} exists: choose another --out, or --force to write over it")


def check_place(out: Path, *sources: Path) -> None:
    """Raises `Refused` where `out` is or holds a source, and (73) where it cannot be written."""
    place = out.resolve()
    for source in sources:
        if source.resolve().is_relative_to(place):
            raise Refused(f"--out {out}: {'is' if source.resolve() == place else 'holds'} what is read; choose another")
    folder = next(parent for parent in place.parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = os.strerror(errno.EACCES if folder.is_dir() else errno.ENOTDIR)
        raise Refused(f"{out}: cannot be written ({reason})", CANNOT_WRITE)


def free_bytes(place: Path) -> int:
    """Of the disk where a file or folder is or is to be."""
    place = place.resolve()
    return shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free


def check_room(out: Path, needed: int) -> None:
    """Raises `Refused` (73) where `needed` bytes are more than are free where `out` is to be."""
    free = free_bytes(out)
    if needed > free:
        raise Refused(
            f"--out {out}: {format_bytes(needed)} are written and {format_bytes(free)} are free; make room, or choose another "
            "disk",
            73,
        )
