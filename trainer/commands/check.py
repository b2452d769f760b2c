"""`scumble check`: pictures and captions of a set looked over before an hour is spent on them. No weight is read."""

import io
import json as json_library
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from scumble.configs import files
from scumble.configs.errors import Refused
from scumble.configs.options import Data, Model, section

SERIOUS = 65  # EX_DATAERR of sysexits.h: the data are wrong in some way
MODEL, DATA, OUT = Model(), Data(), Path("check")


def register(app: App) -> None:
    """Put the command on the command line."""
    app.command(check)


def check(
    source: Annotated[str, Parameter(help="Folder of pictures, or a TOML file: of options or a list of folders")],
    /,
    *,
    model: Annotated[Model, section("Model")] = MODEL,
    data: Annotated[Data, section("Data")] = DATA,
    preset: Annotated[str, Parameter(help="Preset to start from; `scumble presets` lists them")] = "",
    out: Annotated[Path, Parameter(help="Folder for NAME-check.html and NAME-check.jpg, new each time")] = OUT,
    no_page: Annotated[bool, Parameter(help="Write neither the page nor the picture", negative="")] = False,
    json: Annotated[bool, Parameter(help="Print one JSON object, for programs", negative="")] = False,
) -> None:
    """Check pictures and captions, and show what training will see: a page and a contact sheet.

    Exit code 65 where a finding is serious.
    """
    flags = {"model": model.model_dump(exclude_unset=True), "data": data.model_dump(exclude_unset=True)}
    from scumble.datasets.reading.dataset_toml import is_list_of_folders

    file = Path(source) if source.endswith(".toml") and not is_list_of_folders(Path(source)) else None
    if file is None:
        flags["data"]["images"] = source
    options = files.resolve(file, preset, flags)
    _away_from(Path(options.data.images), out)
    from scumble.datasets.checkup.contact_sheet import sheet
    from scumble.datasets.checkup.html_page import page

    from ..base_model.detect import recognise
    from ..plan.findings import as_json, print_findings
    from ..plan.training_set import checked, read_examples, read_views
    from ..run.folder import name_of_set

    base = recognise(options.model)
    name = name_of_set(options.data.images)
    found = read_examples(options)
    with Counting(len(found.examples), hidden=json) as counting:
        done = checked(options, base, found, read_views(found, options, base), not no_page, counting)
    written = []
    if not no_page:
        written = [out / f"{name}-check.html", out / f"{name}-check.jpg"]
        _write(written[0], page(done, name, base.label, options.data.trigger).encode())
        picture = io.BytesIO()
        sheet(done, name, base.label).save(picture, "JPEG", quality=88)
        _write(written[1], picture.getvalue())
    if json:
        told = {"name": name, "base": base.label, **as_json(done), "written": list(map(str, written))}
        print(json_library.dumps(told, ensure_ascii=False))
    else:
        print_findings(done, name, base.label, written)
    if done.is_serious:
        raise SystemExit(SERIOUS)


class Counting:
    """Counts pictures on the terminal while they are read, where there is one and they are many."""

    def __init__(self, total: int, hidden: bool):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("looking at pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.progress = Progress(*columns, transient=True, disable=hidden or total < 50)
        self.task = self.progress.add_task("", total=total)

    def __enter__(self) -> "Counting":
        self.progress.start()
        return self

    def __exit__(self, *trouble: object) -> None:
        self.progress.stop()

    def __call__(self, done: int) -> None:
        self.progress.update(self.task, completed=done)


def _away_from(pictures: Path, out: Path) -> None:
    """Raises `Refused` where the contact sheet would lie among the pictures, to be learned with them."""
    if pictures.is_dir() and out.resolve().is_relative_to(pictures.resolve()):
        raise Refused(f"--out {out}: lies in {pictures}, so that its picture would be learned too; name another folder")


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all. Raises `Refused` (73) where the place cannot be written."""
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise Refused(f"{path}: cannot be written ({error.strerror or error})", 73) from None
