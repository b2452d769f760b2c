"""The command line. Slow imports wait until a command needs them, so that `scumble --help` answers at once."""

import atexit
import gc
import logging
import os
import sys
from contextlib import nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from cyclopts import (
    App,
    CycloptsError,
    MissingArgumentError,
    Parameter,
    UnknownOptionError,
    UnusedCliTokensError,
    ValidationError,
)
from cyclopts.exceptions import ConsumeMultipleError
from pydantic import ValidationError as PydanticError

from scumble.captioning.commands import caption
from scumble.captioning.commands_edit import captions
from scumble.configs import files, reference
from scumble.configs.errors import Refused, did_you_mean, printable
from scumble.configs.exit_codes import FAULT, INTERRUPTED, REFUSED
from scumble.configs.foreign_names import hint
from scumble.configs.options import Model, Options, Previews, section

from .commands import check
from .commands.adapter import adapter
from .commands.cache import cache
from .commands.run_control import register
from .run.folder import OPTIONS, check_format, is_run, name_of_set, status_of
from .system.fast_imports import quick_imports
from .system.output_paths import check_out

app = App(
    name="scumble",
    help="Train a LoRA of a style or a character from a folder of images.",
    help_format="plaintext",
    version=version("scumble"),
    suppress_keyboard_interrupt=False,
)
for command in (adapter, caption, captions):
    app.command(command)
check.register(app)
register(app)
app.command(cache)
app["--help"].group = app["--version"].group = "Other"

DEFAULTS = Options()
OBJECTS_BETWEEN_COLLECTIONS = 10_000  # with Python's default of 700, garbage collection takes a second of the imports
PresetFlag = Annotated[str, Parameter(help="Preset to start from; `scumble presets` lists them")]


@app.command
def train(
    source: Annotated[
        str, Parameter(help="Folder of images, folder of a run, or a TOML file: of options or a list of folders")
    ] = "",
    /,
    *,
    options: Annotated[Options, Parameter(name="*")] = DEFAULTS,
    preset: PresetFlag = "",
    resume: Annotated[
        bool, Parameter(help="Resume runs/NAME if it exists, else start it; safe to repeat", negative="")
    ] = False,
    force: Annotated[
        bool, Parameter(help="Resume although base or images changed, or another process owns the run", negative="")
    ] = False,
    json: Annotated[bool, Parameter(help="Print events as JSON lines, for programs", negative="")] = False,
    dry_run: Annotated[
        bool, Parameter(help="Check everything, print the plan and its reasons, and stop", negative="")
    ] = False,
    measure: Annotated[
        bool, Parameter(help="With --dry-run: also run one step to measure time and memory", negative="")
    ] = False,
) -> None:
    """Train an adapter on a folder of images, or resume an interrupted run: `scumble train runs/NAME`."""
    flags = options.model_dump(exclude_unset=True)
    if measure and not dry_run:
        raise Refused("--measure: only with --dry-run; a run always measures a step first")
    run_folder = None
    if is_run(Path(source)):
        run_folder = Path(source)
    elif source and (not source.endswith(".toml") or _lists_folders(Path(source))):
        flags.setdefault("data", {})["images"] = source
        source = ""
    if resume and run_folder is None:
        named = files.resolve(Path(source) if source.endswith(".toml") else None, preset, flags)
        name = named.output.output_name or name_of_set(named.data.images)
        flags.setdefault("output", {})["output_name"] = name
        run_folder = Path(named.output.output_dir) / name
    wanted = flags.get("optimization", {})
    is_extended = "epochs" in wanted or "steps" in wanted
    if run_folder and is_run(run_folder):
        check_format(run_folder)
        if "epochs" in wanted:
            wanted.setdefault("steps", "auto")
        if not is_extended and status_of(run_folder).state == "done":
            print(f"{run_folder} is finished; to continue it, give more --epochs or --steps")
            return
        resolved = files.resolve(run_folder / OPTIONS, preset, flags)
    else:
        resolved = files.resolve(Path(source) if source.endswith(".toml") else None, preset, flags)
    with quick_imports():
        from .run.events import json_reader, until_closed
        from .run.terminal import Terminal
        from .train import train as run

    with nullcontext(json_reader) if json else Terminal() as reader:
        readers = [until_closed(reader)]
        result = run(resolved, readers, resume=run_folder, force=force, dry_run=dry_run, measured=measure)
    if result and result.code:
        raise SystemExit(result.code)


@app.command
def preview(
    *adapters: Annotated[Path, Parameter(name="ADAPTERS", help="Adapter files to compare, one row per strength")],
    model: Annotated[Model, section("Model")] = DEFAULTS.model,
    previews: Annotated[Previews, section("Previews")] = DEFAULTS.previews,
    strengths: Annotated[
        list[str] | None,
        Parameter(
            help="Strengths of the adapters, after the files; default: 0 0.5 0.8 1 1.2",
            consume_multiple=1,
            negative="",
        ),
    ] = None,
    out: Annotated[Path, Parameter(help="Image file to write")] = Path("preview.png"),
    force: Annotated[bool, Parameter(help="Overwrite an existing file", negative="")] = False,
) -> None:
    """Render prompts with a base model, or with adapters at several strengths, as one labeled grid."""
    flags = {
        "model": model.model_dump(exclude_unset=True),
        "previews": previews.model_dump(exclude_unset=True),
    }
    options = files.resolve(flags=flags)
    check_out(out, ".png", force, *adapters)
    if strengths and not adapters:
        raise Refused("--strengths: only with adapter files, which come before it")
    for prompt in options.previews.prompts:
        if prompt.endswith(".safetensors"):
            raise Refused(f"--prompts {prompt}: is a file, not a prompt; adapter files come before --prompts")
    with quick_imports():
        from .previews.compare import STRENGTHS, compare, strengths_of
        from .previews.gallery import preview_base

    if adapters:
        compare(adapters, options.model, options.previews, strengths_of(strengths or STRENGTHS), out)
    else:
        preview_base(options.model, options.previews, out)
    print(f"wrote {out}")


@app.command(name="options")
def print_options() -> None:
    """Print the reference of all options (Markdown)."""
    sys.stdout.write(reference.reference())


@app.command(name="presets")
def print_presets() -> None:
    """List the presets."""
    known = files.presets()
    width = max(map(len, known))
    for name, purpose in known.items():
        print(f"{name:<{width}}  {purpose}")


def process() -> None:
    """Run `main` as a process that exits without tearing down torch, which would take 0.15 s."""
    code: object = FAULT  # of an exception that nobody catches

    def leave() -> None:
        lost = False
        for stream in (sys.stdout, sys.stderr):
            if stream is None or stream.closed:
                continue
            try:
                stream.flush()
            except BrokenPipeError:  # nobody reads it any more
                pass
            except (OSError, ValueError) as error:
                lost = True
                with suppress(OSError, ValueError):
                    print(f"scumble: the output is incomplete: {error}", file=sys.stderr, flush=True)
        os._exit(120 if lost and not code else code if isinstance(code, int) else bool(code))  # 120 is Python's own

    atexit.register(leave)  # registered first, called last
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
        raise


def main(arguments: list[str] | None = None) -> None:
    """Run a command. What a person can fix is one line on stderr and exit code 2 (or the refusal's own)."""
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS, 10, 10)
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")  # read when the library is imported
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its warnings do not concern this use
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except Refused as error:
        _stop(str(error), error.exit_code)
    except KeyboardInterrupt:
        _stop("stopped by Ctrl-C", INTERRUPTED)
    except CycloptsError as error:
        _stop(_one_line(error), REFUSED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def flags_of(group: App) -> list[str]:
    """Every flag of every command, including those of command groups."""
    found: list[str] = []
    for name in (name for name in group if not name.startswith("-")):
        command = group[name]
        if command.default_command is None:
            found += flags_of(command)
        else:
            arguments = command.assemble_argument_collection()
            found += [flag for argument in arguments for flag in argument.names if flag.startswith("--")]
    return list(dict.fromkeys(found))


def _lists_folders(path: Path) -> bool:
    """Whether a TOML file lists image folders rather than options. Imported here because it needs Pillow."""
    from scumble.datasets.reading.dataset_toml import is_list_of_folders

    return is_list_of_folders(path)


def _one_line(error: CycloptsError) -> str:
    """The parser's refusal as one line."""
    if isinstance(error, UnknownOptionError):
        flag = str(error.token.keyword or error.token.value).partition("=")[0]
        key = flag.lstrip("-").replace("-", "_")
        if elsewhere := hint(flag):
            return f"{flag}: {elsewhere}"
        known = [name.removeprefix("--").replace("-", "_") for name in flags_of(app)]
        close = "" if key in known else did_you_mean(key, known).replace("_", "-").replace("mean ", "mean --")
        return f"{flag}: no such option of this command{close}; see --help, or `scumble options` for all of them"
    if isinstance(error, UnusedCliTokensError):
        return f"{' '.join(error.unused_tokens or ())}: unexpected argument; see --help"
    if isinstance(error, ConsumeMultipleError) and error.argument:
        flag = error.argument.name
        return f"{flag}: give at least one value; if the first one starts with a minus sign, write {flag}=-0.5,1"
    if isinstance(error, MissingArgumentError) and error.argument:
        return f"{' '.join(error.command_chain or ())}: {error.argument.name} is required; see --help".strip()
    if isinstance(error, ValidationError) and isinstance(error.__cause__, PydanticError):
        return str(files.refusal(error.__cause__, files.as_flag))
    return " ".join(str(error).split())


def _stop(line: str, exit_code: int) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(f"scumble: {printable(line)}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    process()
