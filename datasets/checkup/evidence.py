"""The input and output of a check."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from ..reading.discovery import LeftOut
from ..reading.folder import Remark
from .duplicates import look_alike, same_picture
from .measure import ImageMeasures
from .token_window import TokenCount, Window

Severity = Literal["serious", "warning", "note"]
LEARNED = 1 / 3  # a flaw in more than this share of the images is learned


@dataclass(frozen=True)
class Evidence:
    """All that is known about a dataset: its images, the files left out, and what the run trains.

    `caption_texts` has the caption text of each image as training uses it, including the trigger; `written` has the
    captions as they are in the files.
    """

    measures: tuple[ImageMeasures, ...]
    left_out: tuple[LeftOut, ...]
    remarks: tuple[Remark, ...]
    kind: Literal["style", "character"]
    trigger: str
    windows: tuple[Window, ...]
    caption_texts: tuple[str, ...]

    @property
    def written(self) -> list[tuple[ImageMeasures, str]]:
        """Each image with its caption as it is in the file."""
        return [(image, " ".join(image.subject.example.lines)) for image in self.measures]

    @cached_property
    def files(self) -> list[list[ImageMeasures]]:
        """The images, grouped by file content: a group of more than one contains exact copies."""
        groups: dict[str, list[ImageMeasures]] = {}
        for image in self.measures:
            groups.setdefault(image.digest, []).append(image)
        return list(groups.values())

    @cached_property
    def different(self) -> list[ImageMeasures]:
        """The images without exact copies and blank images."""
        return [group[0] for group in self.files if not group[0].exposure.is_empty]

    @cached_property
    def same(self) -> list[list[int]]:
        """Groups of indices into `different` that show the same image."""
        return same_picture([image.likeness for image in self.different])

    @cached_property
    def alike(self) -> list[list[int]]:
        """Groups of indices into `different` that have the same layout and background."""
        return look_alike([image.likeness for image in self.different])

    def count_tokens(self, text: str) -> TokenCount:
        """Count the tokens of a text, with the tokenizer that keeps the least of it."""
        return min((window.count(text) for window in self.windows), key=lambda count: len(count.kept))

    def severity_of(self, count: int) -> Severity:
        """Return "serious" if more than a third of the images, and more than one, have a flaw; otherwise "warning"."""
        return "serious" if count > 1 and count > LEARNED * len(self.measures) else "warning"


@dataclass(frozen=True)
class Observation:
    """One result of a check. `details` has a text per affected image; `cure`, if set, replaces that of the check."""

    severity: Severity
    what: str
    details: dict[str, str] = field(default_factory=dict)
    cure: str = ""


def details_of(texts: Mapping[ImageMeasures, str] | Sequence[tuple[ImageMeasures, str]]) -> dict[str, str]:
    """Return the texts by image path."""
    pairs = texts.items() if isinstance(texts, Mapping) else texts
    return {str(image.path): text for image, text in pairs}


def names_of_others(image: ImageMeasures, group: list[ImageMeasures], limit: int = 2) -> str:
    """List the names of the other images of a group, at most `limit` of them."""
    names = [other.path.name for other in group if other is not image]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
