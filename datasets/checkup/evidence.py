"""What a check is given, and what it gives back."""

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
LEARNED = 1 / 3  # what more than this share of the pictures show is learned


@dataclass(frozen=True)
class Evidence:
    """Everything that is known of a set: pictures, files left out, and what the run is to learn.

    `caption_texts` has what training says of each picture, trigger and all; `written` is what stands in the files.
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
        """Each picture with its caption as it stands in its file."""
        return [(look, " ".join(look.subject.example.lines)) for look in self.measures]

    @cached_property
    def files(self) -> list[list[ImageMeasures]]:
        """The pictures by what their files hold: of copies of one file there are several."""
        groups: dict[str, list[ImageMeasures]] = {}
        for look in self.measures:
            groups.setdefault(look.digest, []).append(look)
        return list(groups.values())

    @cached_property
    def different(self) -> list[ImageMeasures]:
        """One picture of each file that is not one colour all over."""
        return [group[0] for group in self.files if not group[0].exposure.is_empty]

    @cached_property
    def same(self) -> list[list[int]]:
        """Groups of `different` that show one picture."""
        return same_picture([look.likeness for look in self.different])

    @cached_property
    def alike(self) -> list[list[int]]:
        """Groups of `different` that have the same shape and ground."""
        return look_alike([look.likeness for look in self.different])

    def count_tokens(self, text: str) -> TokenCount:
        """By the tokenizer that hears the least of it."""
        return min((window.count(text) for window in self.windows), key=lambda heard: len(heard.kept))

    def spread(self, count: int) -> Severity:
        """Serious where more than a third of the pictures, and more than one, have a fault; else a warning."""
        return "serious" if count > 1 and count > LEARNED * len(self.measures) else "warning"


@dataclass(frozen=True)
class Observation:
    """What one check found; `details` are what to read beside each picture concerned; `cure` if not the usual one."""

    severity: Severity
    what: str
    details: dict[str, str] = field(default_factory=dict)
    cure: str = ""


def details(told: Mapping[ImageMeasures, str] | Sequence[tuple[ImageMeasures, str]]) -> dict[str, str]:
    """By the path of each picture."""
    pairs = told.items() if isinstance(told, Mapping) else told
    return {str(look.path): text for look, text in pairs}


def others(look: ImageMeasures, group: list[ImageMeasures], most: int = 2) -> str:
    """The names of the other pictures of a group, a few of them."""
    names = [other.path.name for other in group if other is not look]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
