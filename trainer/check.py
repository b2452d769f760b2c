"""`scumble check`: the pictures and captions of a set looked over before an hour is spent on them. No weight is read."""

import json as json_library
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from scumble.configs import files
from scumble.configs.options import Data, Model, section

SERIOUS = 65  # EX_DATAERR of sysexits.h: the data are wrong in some way
NAMED = 6  # pictures named in the terminal
COLOURS = {"serious": "bold red", "warning": "yellow", "note": "dim"}


def check(
    source: Annotated[str, Parameter(help="Folder of pictures, or a TOML file of options")],
    /,
    *,
    model: Annotated[Model, section("Model")] = Model(),
    data: Annotated[Data, section("Data")] = Data(),
    preset: Annotated[str, Parameter(help="Preset to start from; `scumble presets` lists them")] = "",
    out: Annotated[Path, Parameter(help="Folder for NAME-check.html and NAME-check.jpg, made anew each time")] = Path(
        "check"
    ),
    no_page: Annotated[bool, Parameter(help="Write neither page nor picture", negative="")] = False,
    json: Annotated[bool, Parameter(help="Print one JSON object, for programs", negative="")] = False,
) -> None:
    """Check pictures and captions, and show what training will see of them.

    Writes a page (NAME-check.html) and a contact sheet (NAME-check.jpg). Exit code 65 where a finding is serious.
    """
    flags = {"model": model.model_dump(exclude_unset=True), "data": data.model_dump(exclude_unset=True)}
    file = Path(source) if source.endswith(".toml") else None
    if file is None:
        flags["data"]["images"] = source
    options = files.resolve(file, preset, flags)
    from scumble.datasets.contact import write_sheet
    from scumble.datasets.page import write_page

    from .pictures import checked
    from .run_folder import name_of_set

    name = name_of_set(options.data.images)
    done, base = checked(options, with_thumbs=not no_page)
    written = []
    if not no_page:
        page, sheet = out / f"{name}-check.html", out / f"{name}-check.jpg"
        write_page(done, name, base, options.data.trigger, page)
        write_sheet(done, name, base, sheet)
        written = [str(page), str(sheet)]
    if json:
        print(json_library.dumps(as_json(done) | {"name": name, "base": base, "written": written}, ensure_ascii=False))
    else:
        _print(done, name, base, written)
    if done.is_serious:
        raise SystemExit(SERIOUS)
