"""An artist's folder -> examples: each picture with its caption and how often it is seen in an epoch.

Folders may be nested; a folder named like kohya's `<repeats>_<class words>` sets both for what is in it, and one named
`reg` holds regularisation pictures. A caption is the text beside a picture, else its line in `metadata.jsonl` or
`.csv`, else the class words. What cannot be used is left out by name and reason, before anything slow starts.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from scumble.configs.errors import Refused

from .caption_tables import Table, read_table
from .dataset_toml import read_list
from .discovery import ImageFolder, LeftOut, Listing, listings, own_name
from .images import SUFFIXES, check_pixels, digest_of_file
from .masks import MaskFiles, hides
from .sidecars import Sidecars, lines_of, read_text

Masks = Literal["auto", "alpha", "off"]


@dataclass(frozen=True)
class Example:
    """One picture of the set. `caption` is `lines`, those of its text, joined with spaces.

    Where `repeats` is 0 it is held out: never trained on, only measured.
    `is_regularization` marks a regularisation picture, `words` are the class words of its folder, `sidecar` is the file that the
    caption came from, a text or a table. `mask` is a picture of what counts, or the image itself: its alpha channel.
    `rules` are options of [data] that hold for this image instead of the run's. `digest` is the hash of the image
    file, set where the image was decoded.
    """

    image: Path
    caption: str
    repeats: int
    is_regularization: bool = False
    lines: tuple[str, ...] = ()
    words: str = ""
    sidecar: Path | None = None
    mask: Path | None = None
    rules: tuple[tuple[str, Any], ...] = ()
    digest: str = ""

    @property
    def is_held_out(self) -> bool:
        return not self.repeats


@dataclass(frozen=True)
class Remark:
    """What a person should know of a file that is used."""

    path: Path
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@dataclass
class ImageSet:
    """The pictures that are used, sorted by path, and every file that is not, with the reason."""

    examples: list[Example] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)

    def __add__(self, other: "ImageSet") -> "ImageSet":
        return ImageSet(self.examples + other.examples, self.left_out + other.left_out, self.remarks + other.remarks)

    def describe(self, limit: int = 20) -> str:
        """What a person should read of the set, lost pictures first; empty where there is nothing to say."""
        lost = [one for one in self.left_out if one.is_image]
        other = [one for one in self.left_out if not one.is_image]
        told = [f"  left out: {one}" for one in [*lost, *other]] + [f"  note: {one}" for one in self.remarks]
        more = [f"  and {len(told) - limit} more; `scumble check` lists them all"] if len(told) > limit else []
        return "\n".join(told[:limit] + more)


def read_set(
    source: Path, repeats: int = 1, is_regularization: bool = False, masks: Masks = "auto", decode: bool = True
) -> ImageSet:
    """The pictures of a folder, or of the folders that a TOML file lists (see dataset_toml.py).

    `masks` "auto" takes mask files, "alpha" also the alpha channel of pictures that have no file, "off" none.
    With `decode`, the pixels of each picture and mask are read once, so that a run meets no bad file.
    Raises `Refused` where the source is not there or no picture of it can be used.
    """
    found = ImageSet()
    if source.is_file():
        listed, remarks = read_list(source)
        places = [
            replace(one, repeats=one.repeats * repeats, is_regularization=one.is_regularization or is_regularization)
            for one in listed
        ]
        found.remarks += [Remark(source, text) for text in remarks]
    elif source.is_dir():
        places = [ImageFolder(source, repeats, is_regularization=is_regularization)]
    else:
        raise Refused(f"{source}: no such folder of pictures")
    named = [folder for place in places for folder in (place.folder, place.masks) if folder]
    outer = {(status.st_dev, status.st_ino) for status in map(Path.stat, named)}
    read: list[Table] = []
    for place in places:
        before = len(found.examples), len(found.left_out)
        tables = [place.table] if place.table else []
        for listing in listings(own_name(place), set(outer)):
            _add(found, listing, tables, masks)
        read += [table for table in tables if table not in read]
        if len(places) > 1 and before == (len(found.examples), len(found.left_out)):
            found.left_out.append(LeftOut(place.folder, "no pictures in it", True))
    found.remarks += [
        Remark(table.path, text) for table in read for text in [*table.troubles, *map(_gone, table.missing())]
    ]
    if decode:
        _check(found)
    if not found.examples:
        raise Refused(_nothing(source, found))
    return found


def _add(found: ImageSet, listing: Listing, tables: list[Table], masks: Masks) -> None:
    """The pictures of one folder with their captions and masks. `tables` are those of the folders around it."""
    place = listing.place
    for path in [] if place.table else listing.tables:
        try:
            tables.insert(0, read_table(path))  # the nearest counts first
        except Refused as error:
            found.left_out.append(LeftOut(path, str(error).removeprefix(str(path)).lstrip(": ")))
    texts_read = [] if place.table else listing.texts
    sidecars, mask_files = Sidecars(texts_read, place.suffixes), MaskFiles(_masks_for(listing))
    owners: dict[Path, Path] = {}
    for image in sorted(listing.images):
        mask = mask_files.of(image)
        texts = sidecars.beside(image)
        owners |= {path: owners.get(path, image) for path in (*texts, *filter(None, [mask]))}
        found.left_out += [LeftOut(text, f"{texts[0].name} is read instead") for text in texts[1:]]
        if texts and owners[texts[0]] != image:
            found.remarks.append(Remark(image, f"shares its caption {texts[0].name} with {owners[texts[0]].name}"))
        try:
            lines, source = _caption(image, texts, tables, place.words)
        except Refused as error:
            found.left_out.append(LeftOut(image, f"its caption {error}", True))
            continue
        if place.table and source is None:
            found.left_out.append(LeftOut(image, f"not named in {place.table.path.name}", True))
            continue
        lines = tuple(" ".join(filter(None, (place.before, line, place.after))) for line in lines)
        if mask is None and (place.alpha or masks == "alpha"):
            mask = image
        found.examples.append(
            Example(
                image, " ".join(lines), place.repeats * place.own, place.is_regularization, lines, place.words, source,
                None if masks == "off" else mask, place.rules,
            )
        )  # fmt: skip
    found.left_out += listing.left_out
    unread = f"captions stand in {place.table.path.name}" if place.table else "no picture of that name"
    found.left_out += [LeftOut(text, unread) for text in listing.texts if text not in owners]
    found.left_out += [LeftOut(mask, "a mask of no picture here") for mask in listing.masks if mask not in owners]


def _caption(
    image: Path, texts: Sequence[Path], tables: Sequence[Table], words: str
) -> tuple[tuple[str, ...], Path | None]:
    """The lines of a caption and the file that they came from."""
    if texts:
        return lines_of(read_text(texts[0])), texts[0]
    for table in tables:
        if (lines := table.of(image)) is not None:
            return lines, table.path
    return ((words,) if words else ()), None


def _masks_for(listing: Listing) -> list[Path]:
    """Mask files of one folder's pictures; those in a folder of masks stand before those beside the pictures."""
    apart = listing.place.masks
    files = [path for path in sorted(apart.iterdir()) if path.is_file()] if apart else []
    return [*listing.masks, *files]


def _check(found: ImageSet) -> None:
    """Decode every picture and mask once and leave out those that cannot be; a mask that hides nothing is dropped."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        checked = list(pool.map(_checked, found.examples))
    found.examples = [one for one in checked if isinstance(one, Example)]
    found.left_out += [one for one in checked if isinstance(one, LeftOut)]


def _checked(example: Example) -> Example | LeftOut:
    if trouble := check_pixels(example.image):
        return LeftOut(example.image, trouble, True)
    example = replace(example, digest=digest_of_file(example.image))
    try:
        if example.mask and not hides(example.image, example.mask):
            return replace(example, mask=None)
    except Refused as error:
        return LeftOut(example.image, f"its mask {error}".replace(f"its mask {example.image}: ", ""), True)
    return example


def _gone(name: str) -> str:
    return f"names {name}, which is not there"


def _nothing(source: Path, found: ImageSet) -> str:
    lost = [one for one in found.left_out if one.is_image]
    if lost:
        return f"{source}: none of its pictures can be used ({len(lost)} left out); the first is {lost[0]}"
    known = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
    return f"{source}: no pictures there ({known}), nor in the folders in it"
