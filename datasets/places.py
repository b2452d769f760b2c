"""Where pictures lie: the folders under a source, what holds for the files in each, and what is passed over."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from .images import SUFFIXES
from .masks import MASK_ENDING
from .sidecars import CAPTION_SUFFIXES

KOHYA_FOLDER = re.compile(r"(\d{1,3})_(.+)")  # more digits are a year or a date
PRIOR_FOLDERS = {"reg", "regularisation", "regularization"}
MASK_FOLDERS = {"masks", "mask"}
TRAIN_SPLITS = {"train", "training"}
TEST_SPLITS = {"test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev"}
TABLES = {"metadata.jsonl", "metadata.csv"}
SYSTEM_FILES = {"thumbs.db", "desktop.ini"}


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that is not used, and why. `picture` says that a picture may be lost by it."""

    path: Path
    reason: str
    picture: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Place:
    """A folder of pictures. Each is seen `repeats` times `own` times; a kohya folder `<own>_<words>` sets the latter.

    `masks` is a folder of masks; with `alpha`, a picture's own alpha channel is the mask where no file is.
    `before` and `after` stand around each line of a caption.
    """

    folder: Path
    repeats: int = 1
    own: int = 1
    words: str = ""
    prior: bool = False
    masks: Path | None = None
    alpha: bool = False
    suffixes: tuple[str, ...] = CAPTION_SUFFIXES
    before: str = ""
    after: str = ""
    deep: bool = True


@dataclass
class Listing:
    """The files of one folder, sorted by what they are; `place` says what holds for them."""

    place: Place
    pictures: list[Path] = field(default_factory=list)
    texts: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def listings(place: Place, seen: set[tuple[int, int]]) -> Iterator[Listing]:
    """Every folder at and below `place`, each once however many links lead to it.

    `seen` holds the (device, inode) of folders that are not to be entered, and is added to. Hidden folders and the
    files that systems strew about are passed over; all else that is no picture, text or table is left out by name.
    """
    listing = listed(place)
    inner: list[Place] = []
    has_train = any(path.name.lower() in TRAIN_SPLITS for path in listing.folders)
    for path in listing.folders:
        named = KOHYA_FOLDER.fullmatch(path.name)
        name, status = path.name.lower(), path.stat()
        if name in MASK_FOLDERS and listing.pictures:
            inside = listed(replace(place, folder=path))
            listing.masks += inside.pictures + inside.masks
            listing.left_out += inside.left_out
        elif has_train and name in TEST_SPLITS:
            listing.left_out.append(LeftOut(path, "a split for tests beside train: not learned from"))
        elif (status.st_dev, status.st_ino) in seen:
            listing.left_out.append(LeftOut(path, "leads to a folder that is read already"))
        elif named and int(named[1]) < 1:
            listing.left_out.append(LeftOut(path, "repeats must be at least 1; rename the folder or take it out", True))
        elif place.deep:
            seen.add((status.st_dev, status.st_ino))
            inner.append(_inside(place, path))
        else:
            listing.left_out.append(LeftOut(path, "a folder inside, which a kohya subset does not enter"))
    yield listing
    for one in sorted(inner, key=lambda one: one.folder):
        yield from listings(one, seen)


def own_name(place: Place) -> Place:
    """A place whose own folder is named like kohya's takes what the name says."""
    named = KOHYA_FOLDER.fullmatch(place.folder.resolve().name)
    if not named or int(named[1]) < 1:
        return place
    return replace(place, own=int(named[1]), words=place.words or named[2].strip())


def _inside(place: Place, folder: Path) -> Place:
    """What holds in a folder of `place`; a folder of masks may have the same folders in it."""
    prior = place.prior or folder.name.lower() in PRIOR_FOLDERS
    masks = place.masks / folder.name if place.masks else None
    place = replace(place, masks=masks if masks and masks.is_dir() else place.masks)
    if named := KOHYA_FOLDER.fullmatch(folder.name):
        return replace(place, folder=folder, prior=prior, own=int(named[1]), words=named[2].strip())
    return replace(place, folder=folder, prior=prior)


def listed(place: Place) -> Listing:
    """The entries of one folder by kind. Real folders stand before links to folders."""
    listing = Listing(place)
    try:
        entries = sorted(place.folder.iterdir(), key=lambda path: (path.is_symlink(), path))
    except OSError as error:
        listing.left_out.append(LeftOut(place.folder, f"cannot be opened ({error.strerror})", True))
        return listing
    for path in entries:
        suffix = path.suffix.lower()
        pictured = suffix in SUFFIXES
        if not _printable(path.name):
            shown = path.name.encode("utf-8", "backslashreplace").decode()
            listing.left_out.append(LeftOut(place.folder / shown, "its name is not UTF-8: rename it", True))
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
            listing.pictures.append(path)
        elif suffix in place.suffixes or suffix in CAPTION_SUFFIXES:
            listing.texts.append(path)
        elif path.name.lower() in TABLES:
            listing.tables.append(path)
        elif path.name.lower() not in SYSTEM_FILES:
            listing.left_out.append(LeftOut(path, "not a picture"))
    return listing


def _printable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
