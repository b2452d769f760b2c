"""The one stream of events of a run: the recipe emits, the file, the terminal and programs only read."""

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
    """Gives every event its time and hands it to each reader. Numbers must be finite."""

    def __init__(self, readers: list[Reader]):
        self.readers = readers

    def emit(self, kind: str, **values: Any) -> None:
        event = {"kind": kind, "t": round(time.time(), 3)} | values
        for reader in self.readers:
            reader(event)


def file_reader(path: Path) -> Reader:
    """Appends each event to `events.jsonl`, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def append(event: Event) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(as_line(event) + "\n")
        except OSError as error:
            raise cannot_write(path, error) from None

    return append


def json_reader(event: Event) -> None:
    """Prints each event for programs (`--json`)."""
    print(as_line(event), flush=True)


def while_it_lasts(reader: Reader) -> Reader:
    """The reader until what it writes into is gone, a closed pipe or terminal; a run goes on without it."""
    gone = False

    def read(event: Event) -> None:
        nonlocal gone
        if not gone:
            try:
                reader(event)
            except OSError:
                gone = True
                to_nowhere()

    return read


def to_nowhere() -> None:
    """Let whatever else is printed vanish, so that nothing fails on its account."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def as_line(event: Event) -> str:
    """One line of strict JSON; a number that is not finite is written as null, since JSON has none."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in event.items()
    }
    return json.dumps(finite, ensure_ascii=False, allow_nan=False)
