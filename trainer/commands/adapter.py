"""`scumble adapter …`: tools for finished adapter files. Torch is imported when a command runs, not for --help."""

import json as json_library
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import BAD_DATA

from ..system.fast_imports import hidden, quick_imports
from ..system.output_paths import check_out
from .adapter_math import SUFFIX, Force, bake, extract, merge, print_lines, resize

adapter = App(name="adapter", help="Inspect and modify finished adapter files.", help_format="plaintext")

for command in (merge, resize, extract, bake):
    adapter.command(command)


@adapter.command
def inspect(
    *files: Annotated[Path, Parameter(help="Adapter files")],
    json: Annotated[bool, Parameter(help="Print one JSON object per file", negative="", show_default=False)] = False,
) -> None:
    """Show what adapter files contain: kind, ranks, trigger words, strength by block, hashes and UI support."""
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
        Literal["kohya", "peft"], Parameter(help="Key names: kohya for every UI, or peft for diffusers")
    ] = "kohya",
    dtype: Annotated[
        Literal["fp16", "bf16", "fp32"] | None, Parameter(help="Number format; default: unchanged")
    ] = None,
    out: Annotated[Path | None, Parameter(help="Output file; default: FILE-kohya or FILE-peft next to FILE")] = None,
    force: Force = False,
) -> None:
    """Convert an adapter to other key names or another number format.

    The metadata is kept, except for file paths.
    """
    target = out or file.with_name(f"{file.stem}-{to}.safetensors")
    check_out(target, SUFFIX, force, file)
    from ..adapters.convert import convert as converted

    print_lines(converted(file, to, dtype or "", target, force))
    print(f"wrote {target}")


@adapter.command
def verify(
    file: Annotated[Path, Parameter(help="Adapter file")],
    /,
    *,
    base: Annotated[str, Parameter(help="Its base: sketch, a diffusers folder, a hub id or a .safetensors file")],
    quick: Annotated[
        bool, Parameter(help="Skip the comparison of outputs; the base is not loaded", negative="", show_default=False)
    ] = False,
) -> None:
    """Check that every UI loads every key, that values and shapes are valid, and that diffusers gives the same output.

    Exits with code 65 if it finds a problem.
    """
    with quick_imports():
        from ..adapters.verify import describe_checks
        from ..adapters.verify import verify as verdict_of
        from . import adapter_tables
    with hidden("bitsandbytes"):
        verdict = verdict_of(file, base, quick)
    checks = list(describe_checks(verdict.checks, verdict.by_layer_reason))
    incomplete = adapter_tables.describe_incomplete(verdict.incomplete_uis, verdict.dialect)
    table = adapter_tables.ui_table(verdict.uis, verdict.diffusers_limit)
    _print(adapter_tables.verdict_page(str(file), table, checks, verdict.skip_reason, verdict.faults, incomplete))
    if not verdict.is_sound:
        raise SystemExit(BAD_DATA)


def _print(page: object) -> None:
    from rich.console import Console

    Console(highlight=False).print(page)
