"""`scumble check`: check the images and captions of a set before training on them. It loads no weights."""

import json as json_library
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from scumble.configs import files
from scumble.configs.atomic import atomic_write
from scumble.configs.errors import Refused
from scumble.configs.exit_codes import BAD_DATA
from scumble.configs.options import Data, Model, section
from scumble.configs.progress import progress_bar

MIN_FOR_BAR = 50  # fewer images are done before anyone would see a progress bar
MODEL, DATA, OUT = Model(), Data(), Path("check")


def register(app: App) -> None:
    """Add the command to the command line."""
    app.command(check)


def check(
    source: Annotated[str, Parameter(help="Folder of images, or a TOML file: of options or a list of folders")],
    /,
    *,
    model: Annotated[Model, section("Model")] = MODEL,
    data: Annotated[Data, section("Data")] = DATA,
    preset: Annotated[str, Parameter(help="Preset to start from; `scumble presets` lists them")] = "",
    out: Annotated[Path, Parameter(help="Folder for NAME-check.html and NAME-check.jpg, which are overwritten")] = OUT,
    no_page: Annotated[bool, Parameter(help="Write no page and no contact sheet", negative="")] = False,
    json: Annotated[bool, Parameter(help="Print one JSON object, for programs", negative="")] = False,
) -> None:
    """Check images and captions, and show how training will see them: an HTML page and a contact sheet.

    The exit code is 65 if a finding is serious.
    """
    flags = {"model": model.model_dump(exclude_unset=True), "data": data.model_dump(exclude_unset=True)}
    from scumble.datasets.reading.dataset_toml import is_list_of_folders

    file = Path(source) if source.endswith(".toml") and not is_list_of_folders(Path(source)) else None
    if file is None:
        flags["data"]["images"] = source
    options = files.resolve(file, preset, flags)
    _check_outside(Path(options.data.images), out)
    from scumble.datasets.checkup.contact_sheet import sheet
    from scumble.datasets.checkup.html_page import page

    from ..base_model.detect import detect_base
    from ..plan.findings import as_json, print_findings
    from ..plan.training_set import crop_set, read_examples, run_checkup
    from ..run.folder import name_of_set

    base = detect_base(options.model)
    name = name_of_set(options.data.images)
    found = read_examples(options)
    total = len(found.examples)
    with progress_bar("checking images", hidden=json or total < MIN_FOR_BAR) as advance:
        cropped = crop_set(found, options, base)
        done = run_checkup(options, base, found, cropped, not no_page, lambda number: advance(number, total))
    written = []
    if not no_page:
        written = [out / f"{name}-check.html", out / f"{name}-check.jpg"]
        with atomic_write(written[0]) as path:
            path.write_text(page(done, name, base.label, options.data.trigger), encoding="utf-8")
        with atomic_write(written[1]) as path:
            sheet(done, name, base.label).save(path, "JPEG", quality=88)
    if json:
        report = {"name": name, "base": base.label, **as_json(done), "written": list(map(str, written))}
        print(json_library.dumps(report, ensure_ascii=False))
    else:
        print_findings(done, name, base.label, written)
    if done.is_serious:
        raise SystemExit(BAD_DATA)


def _check_outside(images: Path, out: Path) -> None:
    """Raises `Refused` if the contact sheet would be written into the image folder, and then trained on."""
    if images.is_dir() and out.resolve().is_relative_to(images.resolve()):
        raise Refused(f"--out {out}: is inside {images}, so the contact sheet would be trained on; use another folder")
