"""Reads a dataset folder into examples: each image with its caption and its repeats per epoch.

Folders may be nested. A folder named like kohya's `<repeats>_<class words>` sets both for the images in it, and a
folder named `reg` holds regularization images. The caption is the text file next to the image, or else its row in
`metadata.jsonl` or `.csv`, or else the class words. Files that cannot be used are left out and reported with the
reason, before anything slow starts.
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
from .discovery import ImageFolder, LeftOut, Listing, listings, with_own_name
from .images import SUFFIXES, check_pixels, digest_of_file
from .masks import MaskFiles, mask_hides_pixels
from .sidecars import Sidecars, lines_of, read_text

Masks = Literal["auto", "alpha", "off"]
MODEL_SUFFIXES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}


@dataclass(frozen=True)
class Example:
    """One image of the dataset.

    `caption` is `lines` joined with spaces. `repeats` is the number of training samples per epoch, 0 for a validation
    image. `words` are the class words of its folder. `sidecar` is the file that the caption comes from, a text file or
    a table. `mask` is a mask file, or the image itself if its alpha channel is the mask. `rules` are options of [data]
    that replace those of the run for this image. `digest` is the hash of the image file, set once it is decoded.
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
    """Something the user should know about a file that is used."""

    path: Path
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@dataclass
class ImageSet:
    """The images that are used, sorted by path, and every file that is not, with the reason."""

    examples: list[Example] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)

    def __add__(self, other: "ImageSet") -> "ImageSet":
        return ImageSet(self.examples + other.examples, self.left_out + other.left_out, self.remarks + other.remarks)

    def describe(self, limit: int = 20) -> str:
        """Return lines on left-out files, images first, and remarks; empty if there are none."""
        lost = [one for one in self.left_out if one.is_image]
        other = [one for one in self.left_out if not one.is_image]
        lines = [f"  left out: {one}" for one in [*lost, *other]] + [f"  note: {one}" for one in self.remarks]
        more = [f"  and {len(lines) - limit} more; `scumble check` lists them all"] if len(lines) > limit else []
        return "\n".join(lines[:limit] + more)


def read_set(
    source: Path, repeats: int = 1, is_regularization: bool = False, masks: Masks = "auto", decode: bool = True
) -> ImageSet:
    """Read the images of a folder, or of the folders listed in a TOML file (see dataset_toml.py).

    `masks` "auto" uses mask files, "alpha" also the alpha channel of images without a mask file, "off" none. With
    `decode`, all images and masks are decoded once, so that training does not hit a broken file. Raises `Refused` if
    the source does not exist or none of its images can be used.
    """
    found = ImageSet()
    if source.is_file() and source.suffix.lower() in SUFFIXES:
        raise Refused(f"{source}: is an image; name its folder")
    if source.is_file() and source.suffix.lower() in MODEL_SUFFIXES:
        raise Refused(f"{source}: is a model file; name a folder of images (a base model goes to --base)")
    if source.is_file():
        listed, remarks = read_list(source)
        folders = [
            replace(one, repeats=one.repeats * repeats, is_regularization=one.is_regularization or is_regularization)
            for one in listed
        ]
        found.remarks += [Remark(source, text) for text in remarks]
    elif source.is_dir():
        folders = [ImageFolder(source, repeats, is_regularization=is_regularization)]
    else:
        raise Refused(f"{source}: no such folder or TOML file")
    named = [path for folder in folders for path in (folder.path, folder.masks) if path]
    outer = {(status.st_dev, status.st_ino) for status in map(Path.stat, named)}
    tables_read: list[Table] = []
    for folder in folders:
        before = len(found.examples), len(found.left_out)
        tables = [folder.table] if folder.table else []
        for listing in listings(with_own_name(folder), set(outer)):
            _add(found, listing, tables, masks)
        tables_read += [table for table in tables if table not in tables_read]
        if len(folders) > 1 and before == (len(found.examples), len(found.left_out)):
            found.left_out.append(LeftOut(folder.path, "contains no images", True))
    found.remarks += [
        Remark(table.path, text) for table in tables_read for text in [*table.problems, *map(_missing, table.missing())]
    ]
    if decode:
        _decode(found)
    if not found.examples:
        raise Refused(_no_images(source, found))
    return found


def _add(found: ImageSet, listing: Listing, tables: list[Table], masks: Masks) -> None:
    """Add the images of one folder with their captions and masks. `tables` are those of its parent folders."""
    source = listing.source
    for path in [] if source.table else listing.tables:
        try:
            tables.insert(0, read_table(path))  # the table of the nearest folder takes precedence
        except Refused as error:
            found.left_out.append(LeftOut(path, str(error).removeprefix(str(path)).lstrip(": ")))
    text_files = [] if source.table else listing.texts
    sidecars, mask_files = Sidecars(text_files, source.suffixes), MaskFiles(_masks_for(listing))
    owners: dict[Path, Path] = {}
    for image in sorted(listing.images):
        mask = mask_files.find(image)
        texts = sidecars.find(image)
        owners |= {path: owners.get(path, image) for path in (*texts, *filter(None, [mask]))}
        found.left_out += [LeftOut(text, f"{texts[0].name} is used instead") for text in texts[1:]]
        if texts and owners[texts[0]] != image:
            found.remarks.append(Remark(image, f"shares its caption {texts[0].name} with {owners[texts[0]].name}"))
        try:
            lines, sidecar = _caption(image, texts, tables, source.words)
        except Refused as error:
            found.left_out.append(LeftOut(image, f"its caption {error}", True))
            continue
        if source.table and sidecar is None:
            found.left_out.append(LeftOut(image, f"not listed in {source.table.path.name}", True))
            continue
        lines = tuple(" ".join(filter(None, (source.prefix, line, source.suffix))) for line in lines)
        if mask is None and (source.alpha or masks == "alpha"):
            mask = image
        found.examples.append(
            Example(
                image, " ".join(lines), source.repeats * source.own_repeats, source.is_regularization, lines,
                source.words, sidecar, None if masks == "off" else mask, source.rules,
            )
        )  # fmt: skip
    found.left_out += listing.left_out
    reason = f"not used, captions come from {source.table.path.name}" if source.table else "no image with this name"
    found.left_out += [LeftOut(text, reason) for text in listing.texts if text not in owners]
    found.left_out += [LeftOut(mask, "mask without a matching image") for mask in listing.masks if mask not in owners]


def _caption(
    image: Path, texts: Sequence[Path], tables: Sequence[Table], words: str
) -> tuple[tuple[str, ...], Path | None]:
    """Return the lines of a caption and the file that they come from."""
    if texts:
        return lines_of(read_text(texts[0])), texts[0]
    for table in tables:
        if (lines := table.caption_lines(image)) is not None:
            return lines, table.path
    return ((words,) if words else ()), None


def _masks_for(listing: Listing) -> list[Path]:
    """Return the mask files for the images of one folder. If an image has several, the last is used."""
    folder = listing.source.masks
    files = [path for path in sorted(folder.iterdir()) if path.is_file()] if folder else []
    return [*listing.masks, *files]


def _decode(found: ImageSet) -> None:
    """Decode every image and mask once, and leave out the broken ones. Drops masks that are fully white."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        checked = list(pool.map(_decoded, found.examples))
    found.examples = [one for one in checked if isinstance(one, Example)]
    found.left_out += [one for one in checked if isinstance(one, LeftOut)]


def _decoded(example: Example) -> Example | LeftOut:
    if problem := check_pixels(example.image):
        return LeftOut(example.image, problem, True)
    example = replace(example, digest=digest_of_file(example.image))
    try:
        if example.mask and not mask_hides_pixels(example.image, example.mask):
            return replace(example, mask=None)
    except Refused as error:
        return LeftOut(example.image, f"its mask {error}".replace(f"its mask {example.image}: ", ""), True)
    return example


def _missing(name: str) -> str:
    return f"lists {name}, which does not exist"


def _no_images(source: Path, found: ImageSet) -> str:
    lost = [one for one in found.left_out if one.is_image]
    if lost:
        return f"{source}: none of its images can be used ({len(lost)} left out); the first is {lost[0]}"
    known = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
    return f"{source}: no images ({known}) in this folder or its subfolders"
