"""Fetches the held-out pictures of `clay-style`: how near does a LoRA come to pictures that it never saw?

`python -m scumble.datasets.samples.fetch_held_out FOLDER` writes FOLDER/NAME.webp and NAME.txt for each row
of clay-style-held-out.tsv. npm fetches the pictures at a pinned version; only the list is kept here.
"""

import csv
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from scumble.configs.errors import Refused

PACKAGE = "@lobehub/fluent-emoji-3d"
VERSION = "1.1.0"
LIST = Path(__file__).with_name("clay-style-held-out.tsv")
MISSING, UNWRITABLE = 69, 73  # exit codes of `Refused`


@dataclass(frozen=True)
class HeldOut:
    """One row of the list: `code` names the picture in the package, `caption` is `NAME, clay style`."""

    code: str
    caption: str

    @property
    def name(self) -> str:
        return self.caption.removesuffix(", clay style")

    @property
    def stem(self) -> str:
        return self.name.replace(" ", "-")


def held_out() -> list[HeldOut]:
    """Every row of clay-style-held-out.tsv, in its order."""
    with LIST.open(encoding="utf-8", newline="") as lines:
        return [HeldOut(**row) for row in csv.DictReader(lines, delimiter="\t")]


def fetch(work: Path) -> Path:
    """Installs the package below `work`; returns its folder of pictures. `Refused` (69) without npm."""
    npm = shutil.which("npm")
    if npm is None:
        raise Refused("npm is not on PATH: install Node.js, then run this again", MISSING)
    command = [npm, "install", "--prefix", str(work), "--no-save", "--no-audit", "--ignore-scripts"]
    done = subprocess.run([*command, f"{PACKAGE}@{VERSION}"], cwd=work, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
        why = said[0].removeprefix("npm error").strip() if said else f"exit code {done.returncode}"
        raise Refused(f"npm could not fetch {PACKAGE}@{VERSION} ({why}): check the network", MISSING)
    return work / "node_modules" / PACKAGE / "assets"


def write(pictures: Path, folder: Path) -> int:
    """Copies each listed picture, writes its caption; returns how many. Writes nothing if one is missing."""
    rows = held_out()
    missing = [row.code for row in rows if not (pictures / f"{row.code}.webp").is_file()]
    if missing:
        raise Refused(f"{PACKAGE}@{VERSION} lacks {len(missing)} pictures, first {missing[0]}.webp", MISSING)
    for row in rows:
        shutil.copyfile(pictures / f"{row.code}.webp", folder / f"{row.stem}.webp")
        (folder / f"{row.stem}.txt").write_text(row.caption + "\n", encoding="utf-8")
    return len(rows)


def prepare(folder: Path) -> None:
    """Makes `folder`, or takes it if it is empty; raises `Refused` otherwise."""
    if folder.exists() and not folder.is_dir():
        raise Refused(f"{folder} is a file: name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise Refused(f"{folder} is not empty: name a new folder, or empty this one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{folder} cannot be made: {error.strerror}", UNWRITABLE) from error


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m scumble.datasets.samples.fetch_held_out FOLDER", file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    folder = Path(arguments[0])
    try:
        prepare(folder)
        with TemporaryDirectory() as work:
            count = write(fetch(Path(work)), folder)
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return refusal.exit_code
    print(f"{count} held-out pictures with captions in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
