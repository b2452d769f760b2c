"""Check output paths and free disk space before the work starts."""

import errno
import os
import shutil
from pathlib import Path

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import CANNOT_WRITE

from .formatting import format_bytes


def check_out(out: Path, suffix: str, force: bool, *sources: Path) -> None:
    """Raises `Refused` if `out` has the wrong suffix, exists without `force`, or fails `check_path`."""
    if out.suffix != suffix:
        raise Refused(f"--out {out}: must end in {suffix}")
    check_path(out, *sources)
    if out.is_dir():
        raise Refused(f"--out {out}: is a folder; choose another name")
    if out.exists() and not force:
        raise Refused(f"--out {out}: file exists; choose another name, or use --force to overwrite it")


def check_path(out: Path, *sources: Path) -> None:
    """Raises `Refused` if `out` is or contains a source, and (73) if it cannot be written."""
    place = out.resolve()
    for source in sources:
        if source.resolve().is_relative_to(place):
            relation = "is" if source.resolve() == place else "contains"
            raise Refused(f"--out {out}: {relation} an input of this command; choose another path")
    folder = next(parent for parent in place.parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = os.strerror(errno.EACCES if folder.is_dir() else errno.ENOTDIR)
        raise Refused(f"{out}: cannot be written ({reason})", CANNOT_WRITE)


def free_bytes(place: Path) -> int:
    """Free bytes on the disk of a file or folder, which need not exist."""
    place = place.resolve()
    return shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free


def check_disk_space(out: Path, needed: int) -> None:
    """Raises `Refused` (73) if the disk of `out` has fewer than `needed` bytes free."""
    free = free_bytes(out)
    if needed > free:
        raise Refused(
            f"--out {out}: needs {format_bytes(needed)}, but only {format_bytes(free)} is free; free up space or use "
            "another disk",
            CANNOT_WRITE,
        )
