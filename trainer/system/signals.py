"""Signals that stop a run, and the exit codes that they ask for."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, Self

from scumble.configs.exit_codes import INTERRUPTED, RESUMABLE

SIGNALS = {signal.SIGINT: ("Ctrl-C", INTERRUPTED), signal.SIGTERM: ("SIGTERM", RESUMABLE)}
if hasattr(signal, "SIGHUP"):  # which Windows has not
    SIGNALS[signal.SIGHUP] = ("the closed terminal", RESUMABLE)


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP while a run lasts: at once (`Interrupted`) until `is_deferred` is set, then noted; a second one is
    at once again.

    True once one came that was noted; `by` and `code` are its name and the exit code that it asks for.
    """

    def __init__(self) -> None:
        self.is_deferred, self.by, self.code = False, "", 0
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no signals
            for number, (by, _) in SIGNALS.items():
                if by != "the closed terminal" or signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *trouble: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.code != 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        by, code = SIGNALS[signal.Signals(number)]
        if not self.is_deferred or self.code:
            raise Interrupted(by, code)
        self.by, self.code = by, code
        with suppress(OSError):  # the terminal may be gone, and print might be at work
            os.write(2, b"scumble: stops after this step and saves; once more stops at once\n")


class Interrupted(BaseException):
    """A signal that stops a run at once: `by` what, and the exit code that it asks for."""

    def __init__(self, by: str, code: int):
        super().__init__(by)
        self.by, self.code = by, code
