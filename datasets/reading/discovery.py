"""Finds the files of a dataset: the folders below a source, their settings, and what is skipped."""

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

KOHYA_FOLDER = re.compile(r"(\d{1,3})_(.+)")  # a longer number is a year or a date
REGULARIZATION_FOLDERS = {"reg", "regularisation", "regularization"}
MASK_FOLDERS = {"masks", "mask"}
TRAIN_SPLITS = {"train", "training"}
TEST_SPLITS = {"test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev"}
TABLES = {"metadata.jsonl", "metadata.csv"}
UNSUPPORTED_SUFFIXES = {
    ".psd", ".psb", ".xcf", ".kra", ".clip", ".svg", ".jxl", ".jp2", ".tga", ".exr", ".hdr", ".ico", ".pdf",
    ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".mp4", ".mov", ".webm", ".mkv", ".avi",
}  # fmt: skip
OUTPUT_FOLDERS = {"events.jsonl": "run folder", "model_index.json": "model folder", "*-check.html": "check-up report"}
SYSTEM_FILES = {"thumbs.db", "desktop.ini"}


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that is not used, and the reason. `is_image` is true if a training image may be lost."""

    path: Path
    reason: str
    is_image: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images. Each is used `repeats` * `own_repeats` times per epoch.

    `own_repeats` and `words` come from the name of a kohya folder, `<own_repeats>_<words>`. `masks` is a folder of
    masks; with `alpha`, an image without a mask file uses its alpha channel. `prefix` and `suffix` are added to each
    line of a caption. `rules` are options of [data] for these images only. With `table`, the images and captions are
    those listed in it, and caption files are not read.
    """

    path: Path
    repeats: int = 1
    own_repeats: int = 1
    words: str = ""
    is_regularization: bool = False
    masks: Path | None = None
    alpha: bool = False
    suffixes: tuple[str, ...] = CAPTION_SUFFIXES
    prefix: str = ""
    suffix: str = ""
    recursive: bool = True
    rules: tuple[tuple[str, Any], ...] = ()
    table: Table | None = None


@dataclass
class Listing:
    """The files of one folder by kind; `source` has the settings that apply to them."""

    source: ImageFolder
    images: list[Path] = field(default_factory=list)
    texts: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def listings(source: ImageFolder, seen: set[tuple[int, int]]) -> Iterator[Listing]:
    """Yield every folder at and below `source`, each once, however many links lead to it.

    `seen` holds the (device, inode) of folders that are not entered, and is extended. Hidden folders and system files
    are skipped silently; any other file that is not an image, caption or table is reported in `left_out`.
    """
    sources = [source]
    while sources:
        source = sources.pop()
        listing, inner = list_folder(source), []
        has_train = any(path.name.lower() in TRAIN_SPLITS for path in listing.folders)
        for path in listing.folders:
            kohya_name = KOHYA_FOLDER.fullmatch(path.name)
            name, status = path.name.lower(), path.stat()
            reason = ""
            if name in MASK_FOLDERS and listing.images:
                inside = list_folder(replace(source, path=path))
                listing.masks += inside.images + inside.masks
                listing.left_out += inside.left_out
            elif output := next((kind for file, kind in OUTPUT_FOLDERS.items() if any(path.glob(file))), ""):
                reason = f"{output}, not training images"
            elif has_train and name in TEST_SPLITS:
                reason = "test split next to a train folder, not used for training"
            elif (status.st_dev, status.st_ino) in seen:
                reason = "links to a folder that is already included"
            elif kohya_name and int(kohya_name[1]) < 1:
                reason = "repeats must be at least 1; rename or remove the folder"
            elif not source.recursive:
                reason = "subfolder, not read for a kohya subset"
            else:
                seen.add((status.st_dev, status.st_ino))
                inner.append(_subfolder(source, path))
            if reason:
                listing.left_out.append(LeftOut(path, reason, bool(kohya_name)))
        yield listing
        sources += sorted(inner, key=lambda one: one.path, reverse=True)


def with_own_name(source: ImageFolder) -> ImageFolder:
    """Apply the repeats and class words of a source that is itself named like a kohya folder."""
    kohya_name = KOHYA_FOLDER.fullmatch(source.path.resolve().name)
    if not kohya_name or int(kohya_name[1]) < 1:
        return source
    return replace(source, own_repeats=int(kohya_name[1]), words=source.words or kohya_name[2].strip())


def _subfolder(source: ImageFolder, path: Path) -> ImageFolder:
    """Return the settings for a subfolder of `source`; a folder of masks may have the same subfolders."""
    is_regularization = source.is_regularization or path.name.lower() in REGULARIZATION_FOLDERS
    masks = source.masks / path.name if source.masks else None
    source = replace(source, masks=masks if masks and masks.is_dir() else source.masks)
    if kohya_name := KOHYA_FOLDER.fullmatch(path.name):
        return replace(
            source, path=path, is_regularization=is_regularization, own_repeats=int(kohya_name[1]),
            words=kohya_name[2].strip(),
        )  # fmt: skip
    return replace(source, path=path, is_regularization=is_regularization)


def list_folder(source: ImageFolder) -> Listing:
    """Return the entries of one folder by kind, real folders before links to folders."""
    listing = Listing(source)
    try:
        entries = sorted(source.path.iterdir(), key=lambda path: (path.is_symlink(), path))
    except OSError as error:
        listing.left_out.append(LeftOut(source.path, f"cannot be opened ({error.strerror})", True))
        return listing
    for path in entries:
        try:
            _add(path, listing)
        except OSError as error:
            listing.left_out.append(LeftOut(path, f"cannot be opened ({error.strerror})", True))
    return listing


def _add(path: Path, listing: Listing) -> None:
    """Add one entry of a folder to its listing."""
    suffix = path.suffix.lower()
    is_image = suffix in SUFFIXES
    if not _is_unicode(path.name):
        shown = os.fsencode(path.name).decode("utf-8", "backslashreplace")
        listing.left_out.append(LeftOut(path.with_name(shown), "file name is not UTF-8; rename the file", True))
    elif path.name.startswith("."):
        if is_image:
            listing.left_out.append(LeftOut(path, "hidden file"))
    elif path.is_dir():
        listing.folders.append(path)
    elif path.is_symlink() and not path.exists():
        listing.left_out.append(LeftOut(path, "broken link", is_image))
    elif not path.is_file():
        listing.left_out.append(LeftOut(path, "not a regular file", is_image))
    elif is_image and path.stem.lower().endswith(MASK_ENDING):
        listing.masks.append(path)
    elif is_image:
        listing.images.append(path)
    elif suffix in listing.source.suffixes or suffix in CAPTION_SUFFIXES:
        listing.texts.append(path)
    elif path.name.lower() in TABLES:
        listing.tables.append(path)
    elif suffix in UNSUPPORTED_SUFFIXES:
        listing.left_out.append(LeftOut(path, f"{suffix} is not supported; convert it to PNG", True))
    elif path.name.lower() not in SYSTEM_FILES:
        listing.left_out.append(LeftOut(path, "not an image"))


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
