"""What libraries do slowly while they are imported, done quicker at the same result.

transformers reads the source of each of its 1,600 model files for what it offers, and does so twice. For each operator
that is registered, torch reads the line where that is done, of which it keeps the number, and compares its file with
those of all modules, to learn which one it is in.
"""

import inspect
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any


@contextmanager
def mended() -> Generator[None]:
    """Within the block modules that are slow to import are changed as soon as they are there."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def read_models_once(import_utils: Any) -> None:
    """Of its folders, some 550, transformers remembers the last 128; and in a file it looks at every line."""
    own = import_utils.fetch__all__
    import_utils.create_import_structure_from_path = cache(import_utils.create_import_structure_from_path.__wrapped__)
    import_utils.fetch__all__ = lambda text: own(text[max(text.rfind("\n__all__"), 0) :])


def read_no_lines(library_utils: Any) -> None:
    """`FILE:NUMBER` of a caller, without the text that is there."""

    def get_source(stacklevel: int) -> str:
        frame = inspect.getframeinfo(sys._getframe(stacklevel), context=0)
        return f"{frame.filename}:{frame.lineno}"

    library_utils.get_source = get_source


def ask_frames_for_modules(library: Any) -> None:
    """The module that a frame runs in, by its name."""

    def getmodule(thing: Any) -> ModuleType | None:
        return sys.modules.get(thing.f_globals["__name__"]) if inspect.isframe(thing) else inspect.getmodule(thing)

    library.inspect = SimpleNamespace(**{**vars(library.inspect), "getmodule": getmodule})


MENDED: dict[str, Callable[[Any], None]] = {
    "transformers.utils.import_utils": read_models_once,
    "torch._library.utils": read_no_lines,
    "torch.library": ask_frames_for_modules,
}


class _Finder(MetaPathFinder):
    """Finds what is mended where it is found anyway."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in MENDED else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                with suppress(AttributeError):  # of a version that has it otherwise
                    MENDED[name](module)

            spec.loader.exec_module = exec_module
        return spec
