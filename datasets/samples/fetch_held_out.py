"""Downloads the held-out images of `clay-style`, for measuring how close a LoRA comes to images it was not trained on.

`python -m scumble.datasets.samples.fetch_held_out FOLDER` writes FOLDER/NAME.webp and NAME.txt for each row
of clay-style-held-out.tsv. npm downloads the images at a pinned version; only the list is part of this repository.
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
    """One row of the list: `code` is the name of the image in the package, `caption` is `NAME, clay style`."""

    code: str
    caption: str

    @property
    def name(self) -> str:
        return self.caption.removesuffix(", clay style")

    @property
    def stem(self) -> str:
        return self.name.replace(" ", "-")


def held_out() -> list[HeldOut]:
    """Return all rows of clay-style-held-out.tsv, in order."""
    with LIST.open(encoding="utf-8", newline="") as lines:
        return [HeldOut(**row) for row in csv.DictReader(lines, delimiter="\t")]


def fetch(work: Path) -> Path:
    """Install the package below `work` and return its image folder. Raises `Refused` (69) without npm or network."""
    npm = shutil.which("npm")
    if npm is None:
        raise Refused("npm: not found on PATH; install Node.js, then run this command again", MISSING)
    command = [npm, "install", "--prefix", str(work), "--no-save", "--no-audit", "--ignore-scripts"]
    done = subprocess.run([*command, f"{PACKAGE}@{VERSION}"], cwd=work, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
        reason = errors[0].removeprefix("npm error").strip() if errors else f"exit code {done.returncode}"
        raise Refused(f"{PACKAGE}@{VERSION}: npm could not download it ({reason}); check the network", MISSING)
    return work / "node_modules" / PACKAGE / "assets"


def write(images: Path, folder: Path) -> int:
    """Copy each listed image, write its caption, and return their number. Writes nothing if an image is missing."""
    rows = held_out()
    missing = [row.code for row in rows if not (images / f"{row.code}.webp").is_file()]
    if missing:
        raise Refused(f"{PACKAGE}@{VERSION}: {len(missing)} images are missing, first {missing[0]}.webp", MISSING)
    for row in rows:
        shutil.copyfile(images / f"{row.code}.webp", folder / f"{row.stem}.webp")
        (folder / f"{row.stem}.txt").write_text(row.caption + "\n", encoding="utf-8")
    return len(rows)


def prepare(folder: Path) -> None:
    """Create `folder`, or accept it if it is empty. Raises `Refused` otherwise, (73) if it cannot be created."""
    if folder.exists() and not folder.is_dir():
        raise Refused(f"{folder}: is a file; choose a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise Refused(f"{folder}: is not empty; choose a new folder, or empty this one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{folder}: cannot be created ({error.strerror})", UNWRITABLE) from error


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit code."""
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
    print(f"{count} held-out images with captions in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
