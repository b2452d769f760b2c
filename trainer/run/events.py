"""The event stream of a run: training emits events; the log file, the terminal and other programs read them."""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scumble.configs.atomic import cannot_write

Event = dict[str, Any]
Reader = Callable[[Event], None]


class Events:
    """Adds a timestamp to each event and passes it to all readers. Numbers should be finite."""

    def __init__(self, readers: list[Reader]):
        self.readers = readers

    def emit(self, kind: str, **values: Any) -> None:
        event = {"kind": kind, "t": round(time.time(), 3)} | values
        for reader in self.readers:
            reader(event)


def file_reader(path: Path) -> Reader:
    """Return a reader that appends each event to `path`, one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def append(event: Event) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(to_json_line(event) + "\n")
        except OSError as error:
            raise cannot_write(path, error) from None

    return append


def json_reader(event: Event) -> None:
    """Print each event as JSON for other programs (`--json`)."""
    print(to_json_line(event), flush=True)


def until_closed(reader: Reader) -> Reader:
    """Wrap a reader so that it is dropped once its pipe or terminal is closed, and the run continues without it."""
    is_closed = False

    def read(event: Event) -> None:
        nonlocal is_closed
        if not is_closed:
            try:
                reader(event)
            except OSError:
                is_closed = True
                silence_stdout()

    return read


def silence_stdout() -> None:
    """Discard further output to stdout, so that printing does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def to_json_line(event: Event) -> str:
    """One line of strict JSON. Non-finite numbers become null, because JSON cannot represent them."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in event.items()
    }
    return json.dumps(finite, ensure_ascii=False, allow_nan=False)
