"""Signals that stop a run, and their exit codes."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, Self

from scumble.configs.exit_codes import INTERRUPTED, RESUMABLE

SIGNALS = {signal.SIGINT: ("Ctrl-C", INTERRUPTED), signal.SIGTERM: ("SIGTERM", RESUMABLE)}
if hasattr(signal, "SIGHUP"):  # not available on Windows
    SIGNALS[signal.SIGHUP] = ("SIGHUP (terminal closed)", RESUMABLE)


class Interrupts:
    """Handles Ctrl-C, SIGTERM and SIGHUP within the block.

    A signal raises `Interrupted` immediately. While `is_deferred` is set, the first one is only recorded: the object
    becomes true, and `by` and `code` hold the name of the signal and its exit code.
    """

    def __init__(self) -> None:
        self.is_deferred, self.by, self.code = False, "", 0
        self.old_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python handles signals only there
            for number, (by, _) in SIGNALS.items():
                if not by.startswith("SIGHUP") or signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
                    self.old_handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.code != 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        by, code = SIGNALS[signal.Signals(number)]
        if not self.is_deferred or self.code:
            raise Interrupted(by, code)
        self.by, self.code = by, code
        with suppress(OSError):  # the terminal may be closed, and print is not reentrant
            os.write(2, b"scumble: will save and stop after this step; interrupt again to stop immediately\n")


class Interrupted(BaseException):
    """Stops a run immediately. `by` is the name of the signal, `code` the exit code."""

    def __init__(self, by: str, code: int):
        super().__init__(by)
        self.by, self.code = by, code
