"""Where pictures lie: the folders under a source, what holds for the files in each, and what is passed over."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .caption_tables import Table
from .images import SUFFIXES
from .masks import MASK_ENDING
from .sidecars import CAPTION_SUFFIXES

KOHYA_FOLDER = re.compile(r"(\d{1,3})_(.+)")  # more digits are a year or a date
PRIOR_FOLDERS = {"reg", "regularisation", "regularization"}
MASK_FOLDERS = {"masks", "mask"}
TRAIN_SPLITS = {"train", "training"}
TEST_SPLITS = {"test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev"}
TABLES = {"metadata.jsonl", "metadata.csv"}
OTHER_PICTURES = {
    ".psd", ".psb", ".xcf", ".kra", ".clip", ".svg", ".jxl", ".jp2", ".tga", ".exr", ".hdr", ".ico", ".pdf",
    ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".mp4", ".mov", ".webm", ".mkv", ".avi",
}  # fmt: skip
MADE_FOLDERS = {"events.jsonl": "a run", "model_index.json": "a model", "*-check.html": "a check of pictures"}
SYSTEM_FILES = {"thumbs.db", "desktop.ini"}


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that is not used, and why. `is_image` says that a picture may be lost by it."""

    path: Path
    reason: str
    is_image: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class ImageFolder:
    """A folder of pictures. Each is seen `repeats` times `own` times; a kohya folder `<own>_<words>` sets the latter.

    `masks` is a folder of masks; with `alpha`, a picture's own alpha channel is the mask where no file is.
    `before` and `after` stand around each line of a caption. `rules` are options of [data] for these pictures alone.
    With `table`, pictures and captions are those that it names, and texts beside pictures are not read.
    """

    folder: Path
    repeats: int = 1
    own: int = 1
    words: str = ""
    is_regularization: bool = False
    masks: Path | None = None
    alpha: bool = False
    suffixes: tuple[str, ...] = CAPTION_SUFFIXES
    before: str = ""
    after: str = ""
    deep: bool = True
    rules: tuple[tuple[str, Any], ...] = ()
    table: Table | None = None


@dataclass
class Listing:
    """The files of one folder, sorted by what they are; `place` says what holds for them."""

    place: ImageFolder
    images: list[Path] = field(default_factory=list)
    texts: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def listings(place: ImageFolder, seen: set[tuple[int, int]]) -> Iterator[Listing]:
    """Every folder at and below `place`, each once however many links lead to it.

    `seen` holds the (device, inode) of folders that are not to be entered, and is added to. Hidden folders and the
    files that systems strew about are passed over; all else that is no picture, text or table is left out by name.
    """
    places = [place]
    while places:
        place = places.pop()
        listing, inner = listed(place), []
        has_train = any(path.name.lower() in TRAIN_SPLITS for path in listing.folders)
        for path in listing.folders:
            named = KOHYA_FOLDER.fullmatch(path.name)
            name, status = path.name.lower(), path.stat()
            reason = ""
            if name in MASK_FOLDERS and listing.images:
                inside = listed(replace(place, folder=path))
                listing.masks += inside.images + inside.masks
                listing.left_out += inside.left_out
            elif made := next((what for file, what in MADE_FOLDERS.items() if any(path.glob(file))), ""):
                reason = f"{made}, not pictures to learn from"
            elif has_train and name in TEST_SPLITS:
                reason = "a split for tests beside train: not learned from"
            elif (status.st_dev, status.st_ino) in seen:
                reason = "leads to a folder that is read already"
            elif named and int(named[1]) < 1:
                reason = "repeats must be at least 1; rename the folder or take it out"
            elif not place.deep:
                reason = "a folder inside, which a subset of kohya's does not enter"
            else:
                seen.add((status.st_dev, status.st_ino))
                inner.append(_inside(place, path))
            if reason:
                listing.left_out.append(LeftOut(path, reason, bool(named)))
        yield listing
        places += sorted(inner, key=lambda one: one.folder, reverse=True)


def own_name(place: ImageFolder) -> ImageFolder:
    """A place whose own folder is named like kohya's takes what the name says."""
    named = KOHYA_FOLDER.fullmatch(place.folder.resolve().name)
    if not named or int(named[1]) < 1:
        return place
    return replace(place, own=int(named[1]), words=place.words or named[2].strip())


def _inside(place: ImageFolder, folder: Path) -> ImageFolder:
    """What holds in a folder of `place`; a folder of masks may have the same folders in it."""
    is_regularization = place.is_regularization or folder.name.lower() in PRIOR_FOLDERS
    masks = place.masks / folder.name if place.masks else None
    place = replace(place, masks=masks if masks and masks.is_dir() else place.masks)
    if named := KOHYA_FOLDER.fullmatch(folder.name):
        return replace(
            place, folder=folder, is_regularization=is_regularization, own=int(named[1]), words=named[2].strip()
        )
    return replace(place, folder=folder, is_regularization=is_regularization)


def listed(place: ImageFolder) -> Listing:
    """The entries of one folder by kind. Real folders stand before links to folders."""
    listing = Listing(place)
    try:
        entries = sorted(place.folder.iterdir(), key=lambda path: (path.is_symlink(), path))
    except OSError as error:
        listing.left_out.append(LeftOut(place.folder, f"cannot be opened ({error.strerror})", True))
        return listing
    for path in entries:
        try:
            _sort(path, listing)
        except OSError as error:
            listing.left_out.append(LeftOut(path, f"cannot be opened ({error.strerror})", True))
    return listing


def _sort(path: Path, listing: Listing) -> None:
    """Put one entry of a folder where it belongs."""
    suffix = path.suffix.lower()
    pictured = suffix in SUFFIXES
    if not _printable(path.name):
        shown = os.fsencode(path.name).decode("utf-8", "backslashreplace")
        listing.left_out.append(LeftOut(path.with_name(shown), "its name is not UTF-8: rename it", True))
    elif path.name.startswith("."):
        if pictured:
            listing.left_out.append(LeftOut(path, "a hidden file"))
    elif path.is_dir():
        listing.folders.append(path)
    elif path.is_symlink() and not path.exists():
        listing.left_out.append(LeftOut(path, "a link that leads nowhere", pictured))
    elif not path.is_file():
        listing.left_out.append(LeftOut(path, "not a file", pictured))
    elif pictured and path.stem.lower().endswith(MASK_ENDING):
        listing.masks.append(path)
    elif pictured:
        listing.images.append(path)
    elif suffix in listing.place.suffixes or suffix in CAPTION_SUFFIXES:
        listing.texts.append(path)
    elif path.name.lower() in TABLES:
        listing.tables.append(path)
    elif suffix in OTHER_PICTURES:
        listing.left_out.append(LeftOut(path, f"{suffix[1:]} is not read; save it as PNG", True))
    elif path.name.lower() not in SYSTEM_FILES:
        listing.left_out.append(LeftOut(path, "not a picture"))


def _printable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
