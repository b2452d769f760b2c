"""An artist's folder -> examples: each picture with its caption and how often it is seen in an epoch.

Folders may be nested; a folder named like kohya's `<repeats>_<class words>` sets both for what is in it, and one named
`reg` holds regularisation pictures. A caption is the text beside a picture, else its line in `metadata.jsonl` or
`.csv`, else the class words. What cannot be used is left out by name and reason, before anything slow starts.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from scumble.configs.errors import Refused

from .images import SUFFIXES, check_pixels
from .places import KOHYA_FOLDER, LeftOut, Listing, Place, listings
from .sidecars import Sidecars, lines_of, read_text


@dataclass(frozen=True)
class Example:
    """One picture of the set. `caption` is `lines`, those of its text, joined with spaces.

    `prior` marks a regularisation picture, `words` are the class words of its folder, `sidecar` is the file that the
    caption came from. `mask` is a picture of what counts; where it is the image itself, its alpha channel is.
    """

    image: Path
    caption: str
    repeats: int
    prior: bool = False
    lines: tuple[str, ...] = ()
    words: str = ""
    sidecar: Path | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class Remark:
    """What a person should know of a file that is used."""

    path: Path
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@dataclass
class PictureSet:
    """The pictures that are used, sorted by path, and every file that is not, with the reason."""

    examples: list[Example] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)

    def __add__(self, other: "PictureSet") -> "PictureSet":
        return PictureSet(self.examples + other.examples, self.left_out + other.left_out, self.remarks + other.remarks)

    def told(self, limit: int = 20) -> str:
        """What a person should read of the set, lost pictures first; empty where there is nothing to say."""
        lost = [one for one in self.left_out if one.picture]
        other = [one for one in self.left_out if not one.picture]
        told = [f"  left out: {one}" for one in [*lost, *other]] + [f"  note: {one}" for one in self.remarks]
        more = [f"  and {len(told) - limit} more; `scumble check` lists them all"] if len(told) > limit else []
        return "\n".join(told[:limit] + more)


def read_set(source: Path, repeats: int = 1, prior: bool = False, decode: bool = True) -> PictureSet:
    """The pictures of a folder. With `decode`, the pixels of each are read once, so that a run meets no bad file.

    Raises `Refused` where the source is not there or no picture of it can be used.
    """
    if not source.is_dir():
        raise Refused(f"{source}: no such folder of pictures")
    named = KOHYA_FOLDER.fullmatch(source.resolve().name)
    own, words = (int(named[1]), named[2].strip()) if named and int(named[1]) else (1, "")
    found = PictureSet()
    for listing in listings(Place(source, repeats, own, words, prior), seen_of([source])):
        add(found, listing)
    if decode:
        check(found)
    if not found.examples:
        raise Refused(_nothing(source, found))
    return found


def seen_of(folders: Iterable[Path]) -> set[tuple[int, int]]:
    """(device, inode) of folders, by which a link to one of them is known."""
    return {(status.st_dev, status.st_ino) for status in (folder.stat() for folder in folders)}


def add(found: PictureSet, listing: Listing) -> None:
    """The pictures of one folder with their captions."""
    place, claimed = listing.place, set[Path]()
    sidecars = Sidecars(listing.texts, place.suffixes)
    owners: dict[Path, Path] = {}
    for image in sorted(listing.pictures):
        texts = sidecars.beside(image)
        claimed.update(texts)
        try:
            lines = lines_of(read_text(texts[0])) if texts else (place.words,) if place.words else ()
        except Refused as error:
            found.left_out.append(LeftOut(image, f"its caption {error}", True))
            continue
        for text in texts[:1]:
            if text in owners:
                found.remarks.append(Remark(image, f"shares its caption {text.name} with {owners[text].name}"))
            owners.setdefault(text, image)
        found.examples.append(
            Example(
                image, " ".join(lines), place.repeats * place.own, place.prior, lines, place.words,
                texts[0] if texts else None,
            )
        )  # fmt: skip
        found.left_out += [LeftOut(text, f"{texts[0].name} is read instead") for text in texts[1:]]
    found.left_out += listing.left_out
    found.left_out += [LeftOut(text, "no picture of that name") for text in listing.texts if text not in claimed]


def check(found: PictureSet) -> None:
    """Decode every picture once and leave out those that cannot be."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        reasons = list(pool.map(check_pixels, [example.image for example in found.examples]))
    found.left_out += [
        LeftOut(example.image, reason, True) for example, reason in zip(found.examples, reasons, strict=True) if reason
    ]
    found.examples = [example for example, reason in zip(found.examples, reasons, strict=True) if not reason]


def _nothing(source: Path, found: PictureSet) -> str:
    lost = [one for one in found.left_out if one.picture]
    if lost:
        return f"{source}: none of its {len(lost)} pictures can be used; the first is {lost[0]}"
    known = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
    return f"{source}: no pictures there ({known}), nor in the folders in it"
