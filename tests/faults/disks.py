"""Disks that fill up or become read-only.

Mounted ones where that is allowed. Else as an ordinary user comes by them: no file can grow, or no folder be written
into, which root may unless it gives that right away for a while.
"""

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

MOUNTED, ORDINARY = "mounted", "ordinary"
GROWN_BYTES = 1024  # larger no file gets where the disk is full
CAP_DAC_OVERRIDE = 1 << 1  # capabilities(7): write whatever the permissions say


class Disk:
    """A folder `place`, mounted with 8 MB if that is wanted and allowed; it can fill up, become read-only, and mend."""

    def __init__(self, place: Path, kind: str):
        place.mkdir()
        self.place, self.filler = place, place / "filler"
        self.is_mounted = kind == MOUNTED and _mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place))
        self.limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.getsignal(signal.SIGXFSZ)

    def fill(self) -> None:
        """From here on there is no room, neither in old files nor in new ones."""
        if self.is_mounted:
            with suppress(OSError), self.filler.open("wb") as file:
                while True:
                    file.write(b"0" * 4096)
                    file.flush()
        else:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (GROWN_BYTES, self.limit[1]))

    def make_read_only(self) -> None:
        """From here on nothing can be written, made or renamed in it."""
        if self.is_mounted:
            assert _mount("-o", "remount,ro", str(self.place))
        else:
            _write_anywhere(False)
            for folder in self._folders():
                folder.chmod(0o555)

    def mend(self) -> None:
        """Room again, and the right to write."""
        if self.is_mounted:
            assert _mount("-o", "remount,rw", str(self.place))
            self.filler.unlink(missing_ok=True)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, self.limit)
            signal.signal(signal.SIGXFSZ, self.handler)
            for folder in self._folders():
                folder.chmod(0o755)
            _write_anywhere(True)

    def remove(self) -> None:
        """Mended and gone."""
        self.mend()
        if self.is_mounted:
            subprocess.run(["umount", "-l", str(self.place)], check=True)
        shutil.rmtree(self.place)

    def _folders(self) -> list[Path]:
        return [self.place, *(path for path in self.place.rglob("*") if path.is_dir())]


def _mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


def _write_anywhere(allowed: bool) -> None:
    """Give root's right to write whatever the permissions say back to this thread, or take it away (capset(2))."""
    if os.geteuid() != 0 or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; the low halves first
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] = sets[0] | CAP_DAC_OVERRIDE & sets[1] if allowed else sets[0] & ~CAP_DAC_OVERRIDE
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")
