"""Import libraries faster, without garbage collection and without optional packages that they probe for."""

import gc
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quick_imports() -> Generator[None]:
    """Disable garbage collection within the block, and exempt the imported objects from later collections.

    bitsandbytes is hidden within the block, because it is slow to import.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with hidden("bitsandbytes"):
            yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def hidden(package: str) -> Generator[None]:
    """Hide a package that is not imported yet within the block.

    It can be imported afterwards, but libraries that looked for it within the block may have cached its absence.
    """
    modules: dict[str, Any] = sys.modules
    was_imported = package in modules
    if not was_imported:
        modules[package] = None  # makes imports raise ModuleNotFoundError
    try:
        yield
    finally:
        if modules.get(package, package) is None:
            del modules[package]
