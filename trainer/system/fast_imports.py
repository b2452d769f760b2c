"""Libraries imported without what they look for needlessly: garbage, and packages that nobody here wants of them."""

import gc
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quick_imports() -> Generator[None]:
    """Within the block what imports make is not searched for garbage, of which there is little; nor is it later.

    They do not find bitsandbytes, whose own import takes long.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        with hidden("bitsandbytes"):
            yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


@contextmanager
def hidden(package: str) -> Generator[None]:
    """Within the block nobody finds a package that is not imported yet. After it, it can be imported; libraries that
    asked before may remember that there is none."""
    modules: dict[str, Any] = sys.modules
    was_there = package in modules
    if not was_there:
        modules[package] = None  # for the import system: there is none
    try:
        yield
    finally:
        if modules.get(package, package) is None:
            del modules[package]
