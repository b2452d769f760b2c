"""`scumble adapter …`: tools for finished files. Torch is imported when a command runs, not when help is asked for."""

import json as json_library
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from scumble.configs.errors import Refused

adapter = App(name="adapter", help="Look into finished adapter files, and change them.", help_format="plaintext")

# Commands of other modules are put on here, each with one line: `adapter.command(function)`.


@adapter.command
def inspect(
    *files: Annotated[Path, Parameter(help="Adapter files")],
    json: Annotated[bool, Parameter(help="Print one JSON object a file, for programs", negative="")] = False,
) -> None:
    """Tell what adapter files are: kind, ranks, words, strength by block, hashes, which UIs read them."""
    if not files:
        raise Refused("adapter inspect: name at least one adapter file")
    from . import tables
    from .inspect import inspect as report_of

    for file in files:
        report = report_of(file)
        if json:
            print(json_library.dumps(tables.as_json(report), ensure_ascii=False))
        else:
            _print(tables.report_page(report))


@adapter.command
def convert(
    file: Annotated[Path, Parameter(help="Adapter file")],
    /,
    *,
    to: Annotated[Literal["kohya", "peft"], Parameter(help="Names of the keys: kohya's, for every UI, or PEFT's")],
    dtype: Annotated[
        Literal["fp16", "bf16", "fp32"] | None, Parameter(help="Number format; none: the file's own")
    ] = None,
    out: Annotated[Path | None, Parameter(help="File to write; none: FILE with the dialect in its name")] = None,
    force: Annotated[bool, Parameter(help="Write over a file that is there", negative="")] = False,
) -> None:
    """Write an adapter with other key names or in another number format; its metadata is kept."""
    from .convert import convert as converted

    written = converted(file, to, dtype or "", out or file.with_name(f"{file.stem}-{to}.safetensors"), force)
    print(f"wrote {written}")


def _print(page: object) -> None:
    from rich.console import Console

    Console(highlight=False).print(page)
