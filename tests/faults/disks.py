"""Disks that become full or read-only.

They are mounted if permitted. Otherwise they are simulated without mounting: a resource limit keeps files from growing,
and folder permissions prevent writes. Root ignores permissions, so it temporarily drops this capability.
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
MAX_FILE_BYTES = 1024  # file size limit on a simulated full disk
CAP_DAC_OVERRIDE = 1 << 1  # capabilities(7): write regardless of permissions


class Disk:
    """A folder that can become full or read-only, and be restored: an 8 MB mount if requested and permitted."""

    def __init__(self, place: Path, kind: str):
        place.mkdir()
        self.place, self.filler = place, place / "filler"
        self.is_mounted = kind == MOUNTED and _mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place))
        self.limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.getsignal(signal.SIGXFSZ)

    def fill(self) -> None:
        """Leave no space, neither for existing files nor for new ones."""
        if self.is_mounted:
            with suppress(OSError), self.filler.open("wb") as file:
                while True:
                    file.write(b"0" * 4096)
                    file.flush()
        else:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, self.limit[1]))

    def make_read_only(self) -> None:
        """Prevent writing, creating and renaming files in the folder."""
        if self.is_mounted:
            assert _mount("-o", "remount,ro", str(self.place))
        else:
            _write_anywhere(False)
            for folder in self._folders():
                folder.chmod(0o555)

    def restore(self) -> None:
        """Restore free space and write permission."""
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
        """Restore and delete the folder."""
        self.restore()
        if self.is_mounted:
            subprocess.run(["umount", "-l", str(self.place)], check=True)
        shutil.rmtree(self.place)

    def _folders(self) -> list[Path]:
        return [self.place, *(path for path in self.place.rglob("*") if path.is_dir())]


def _mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


def _write_anywhere(allowed: bool) -> None:
    """Grant or drop root's capability to write regardless of permissions, for this thread (capset(2))."""
    if os.geteuid() != 0 or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; low words first
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] = sets[0] | CAP_DAC_OVERRIDE & sets[1] if allowed else sets[0] & ~CAP_DAC_OVERRIDE
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")
