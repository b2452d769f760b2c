"""`scumble adapter …`: tools for finished files. Torch is imported when a command runs, not when help is asked for."""

import json as json_library
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import BAD_DATA

from ..system.fast_imports import hidden, quick_imports
from ..system.output_paths import check_out
from .adapter_math import SUFFIX, Force, bake, extract, merge, resize, tell

adapter = App(name="adapter", help="Look into finished adapter files, and change them.", help_format="plaintext")

for command in (merge, resize, extract, bake):
    adapter.command(command)


@adapter.command
def inspect(
    *files: Annotated[Path, Parameter(help="Adapter files")],
    json: Annotated[
        bool, Parameter(help="Print one JSON object a file, for programs", negative="", show_default=False)
    ] = False,
) -> None:
    """Tell what adapter files are: kind, ranks, words, strength by block, hashes, which UIs read them."""
    if not files:
        raise Refused("adapter inspect: name at least one adapter file")
    from ..adapters.inspect import inspect as report_of
    from . import adapter_tables

    for file in files:
        report = report_of(file)
        if json:
            print(json_library.dumps(adapter_tables.as_json(report), ensure_ascii=False))
        else:
            _print(adapter_tables.report_page(report))


@adapter.command
def convert(
    file: Annotated[Path, Parameter(help="Adapter file")],
    /,
    *,
    to: Annotated[
        Literal["kohya", "peft"], Parameter(help="Names of the keys: kohya's, for every UI, or PEFT's for diffusers")
    ] = "kohya",
    dtype: Annotated[
        Literal["fp16", "bf16", "fp32"] | None, Parameter(help="Number format; none: the file's own")
    ] = None,
    out: Annotated[Path | None, Parameter(help="File to write; none: FILE-kohya or FILE-peft beside it")] = None,
    force: Force = False,
) -> None:
    """Write an adapter with other key names or in another number format.

    Its metadata is kept, but for paths of a disk.
    """
    target = out or file.with_name(f"{file.stem}-{to}.safetensors")
    check_out(target, SUFFIX, force, file)
    from ..adapters.convert import convert as converted

    tell(converted(file, to, dtype or "", target, force))
    print(f"wrote {target}")


@adapter.command
def verify(
    file: Annotated[Path, Parameter(help="Adapter file")],
    /,
    *,
    base: Annotated[str, Parameter(help="Its base: sketch, a diffusers folder, a hub id or a .safetensors file")],
    quick: Annotated[
        bool, Parameter(help="Leave out the trial on the base; nothing is loaded", negative="", show_default=False)
    ] = False,
) -> None:
    """Check that every UI finds a home for every key, that numbers and shapes are right, and that diffusers agrees.

    Exit code 65 where something is wrong.
    """
    with quick_imports():
        from ..adapters.verify import trial_lines
        from ..adapters.verify import verify as verdict_of
        from . import adapter_tables
    with hidden("bitsandbytes"):
        verdict = verdict_of(file, base, quick)
    trials = list(trial_lines(verdict.trials, verdict.parted))
    poor = adapter_tables.not_whole(verdict.poor, verdict.dialect) if verdict.poor else ""
    table = adapter_tables.ui_table(verdict.uis, verdict.beyond_diffusers)
    _print(adapter_tables.verdict_page(str(file), table, trials, verdict.untried, verdict.faults, poor))
    if not verdict.is_sound:
        raise SystemExit(BAD_DATA)


def _print(page: object) -> None:
    from rich.console import Console

    Console(highlight=False).print(page)
