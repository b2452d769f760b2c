"""The check-up of a set before an hour is spent on it: what was found, why it matters, what to do.

`CHECKS` is the table of all checks. A fault of single pictures is a warning, and serious where more than a third of
the set has it: what a third of the pictures show is learned.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scumble.configs.words import counted

from ..crop_loss import BucketUse, bucket_uses
from ..crops import CroppedExample
from ..reading.folder import Example, ImageSet
from . import caption_checks, picture_checks
from .duplicates import nearest
from .evidence import Evidence, Observation, Severity
from .measure import CheckedImage, ImageMeasures, measure_images
from .token_window import Window
from .watermarks import Corners

FEW = 1000  # pictures of which thumbs and corners are kept: about 45 MB
SEVERITIES: tuple[Severity, ...] = ("serious", "warning", "note")
OF_FILES = {"left out", "remarks"}  # checks of which every file is named, since it is on no picture of the page


@dataclass(frozen=True)
class Check:
    """One thing that is looked for, why it matters and what to do about it."""

    name: str
    why: str
    cure: str
    find: Callable[[Evidence], Iterator[Observation]]


CHECKS = (
    Check(
        "left out", "what is left out is not learned", "mend each file as its reason says, or take it out",
        picture_checks.left_out,
    ),
    Check(
        "remarks", "what a file says may not be what is done", "read them; nothing, if that is meant",
        picture_checks.remarks,
    ),
    Check(
        "few pictures", "from few pictures the adapter learns these pictures rather than what they share",
        "add pictures that differ from each other; mirroring (--random-flip) helps a little", picture_checks.few,
    ),
    Check(
        "empty picture", "there is nothing in it to learn, and its caption comes to mean an empty area",
        "take it out", picture_checks.empty,
    ),
    Check(
        "same file", "a picture that is there twice is learned twice as hard, and comes back from any prompt",
        "keep one of each; to see a picture more often on purpose, use repeats", picture_checks.same_file,
    ),
    Check(
        "same picture", "one picture in two files is learned twice as hard, and comes back from any prompt",
        "keep the best of each: the larger and cleaner file", picture_checks.same_picture,
    ),
    Check(
        "mark in a corner", "a signature, watermark or date that many pictures share is learned with them and painted "
        "into the corner", "crop it away or paint it out; if it must stay, say it in every caption ('signature')",
        picture_checks.marks,
    ),
    Check(
        "too small", "enlarged pictures are soft, and the adapter learns softness",
        "find larger files, use an upscaler, or lower --resolution", picture_checks.small,
    ),
    Check(
        "blurred", "even its sharpest edges are soft at the size at which it is learned; what is painted will be too",
        "take a sharper picture; where softness is the style, let it be", picture_checks.blurred,
    ),
    Check(
        "JPEG blocks", "blocks and ringing of strong compression are learned like any texture",
        "find the original; a re-saved copy does not mend it", picture_checks.blocks,
    ),
    Check(
        "borders", "bars and frames are learned as part of every picture", "crop them away", picture_checks.borders,
    ),
    Check(
        "exposure", "where almost everything is black or white, little is left to learn from",
        "lighten or darken it, or take it out", picture_checks.exposure,
    ),
    Check(
        "unlike in light", "one picture far darker or lighter than the rest pulls the whole style its way",
        "adjust it, or say it in its caption ('at night')", picture_checks.outliers,
    ),
    Check(
        "much cut off", "training sees the framed part alone",
        "look at the frames; crop by hand, or try --crop focus", picture_checks.cut_off,
    ),
    Check(
        "look alike", "what stays the same in them (pose, ground, framing) is learned as part of the thing itself",
        "add other poses, distances and grounds, or name in the captions what stays the same", picture_checks.alike,
    ),
    Check(
        "no caption", "without words for what is in a picture, all of it goes into the trigger",
        "write NAME.txt beside it: what is to be seen, without the style itself", caption_checks.missing,
    ),
    Check(
        "same caption", "one caption for different pictures leaves nothing to tell them apart by",
        "say what differs", caption_checks.alike,
    ),
    Check(
        "too long", "the base hears a limited number of tokens; what is beyond is never learned",
        "shorten it, most important words first", caption_checks.long,
    ),
    Check(
        "trigger", "the trigger calls the adapter; it is put before every caption that lacks it",
        "nothing, if that is meant; else write it where you want it", caption_checks.trigger,
    ),
    Check(
        "nothing calls it", "a character without a word of its own mixes with whatever the base knows by the caption",
        "give --trigger a rare word, or put one into every caption", caption_checks.uncalled,
    ),
    Check(
        "in every caption", "what stands in every caption becomes the name of what the pictures share, like a trigger",
        "fine for a trigger; take out other words that should stay free", caption_checks.shared,
    ),
    Check(
        "two spellings", "the base takes two spellings for two things",
        "choose one: `scumble captions replace`", caption_checks.spellings,
    ),
    Check(
        "said once", "a tag that stands in one caption is learned by that picture alone",
        "nothing for what is there once; check for slips of the pen", caption_checks.once,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that was found. `details` has for each picture concerned what a person should read beside it."""

    check: str
    severity: Severity
    what: str
    why: str
    cure: str
    details: dict[str, str]


@dataclass(frozen=True)
class Facts:
    """What the set is. `likeness` is of the median picture to the one that is most like it, from -1 to 1,
    copies of one picture counted once."""

    images: int
    regularization_images: int
    samples: int
    smallest: str
    largest: str
    buckets: tuple[BucketUse, ...]
    likeness: float
    captions: int

    @property
    def variety(self) -> str:
        """How far the pictures are from each other, in a word."""
        return "one of a kind" if self.images < 2 else next(
            word for least, word in ((0.9, "little"), (0.75, "some"), (-1.0, "much")) if self.likeness >= least - 1e-6
        )  # fmt: skip


@dataclass(frozen=True)
class Checkup:
    """All of it. `samples` has a picture each, `findings` stand with the serious ones first.

    `caption_texts` has of each caption what the base hears and what it does not.
    """

    measures: tuple[ImageMeasures, ...]
    caption_texts: tuple[tuple[str, str], ...]
    findings: tuple[Finding, ...]
    facts: Facts

    @property
    def is_serious(self) -> bool:
        return any(finding.severity == "serious" for finding in self.findings)

    def of(self, picture: str) -> list[Finding]:
        """What was found of one picture."""
        return [finding for finding in self.findings if picture in finding.details]


def check_images(
    found: ImageSet,
    views: Sequence[CroppedExample],
    *,
    kind: Literal["style", "character"],
    trigger: str,
    windows: Sequence[Window],
    heard: Callable[[Example], str],
    with_thumbs: bool = True,
    tell: Callable[[int], None] = lambda done: None,
) -> Checkup:
    """Look at every picture and caption of a set; regularisation pictures are counted but not judged.

    `caption_texts` gives what training says of a picture whose caption is written. Raises `Refused` naming a picture that
    cannot be read any more.
    """
    subjects = subjects_of(view for view in views if not view.example.is_regularization)
    looks = []
    with_thumbs = with_thumbs and len(subjects) <= FEW  # of a large set those that are shown are read again
    for look in measure_images(subjects, with_thumbs):
        looks.append(look if len(looks) < FEW else replace(look, corners=Corners(None)))
        tell(len(looks))
    spoken = [heard(subject.example) for subject in subjects]
    material = Evidence(
        tuple(looks), tuple(found.left_out), tuple(found.remarks), kind, trigger, tuple(windows), tuple(spoken)
    )
    findings = [
        Finding(check.name, one.severity, one.what, check.why, one.cure or check.cure, one.details)
        for check in CHECKS
        for one in check.find(material)
    ]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    heard_of = [material.count_tokens(text) for text in spoken]
    kept = tuple((one.kept, one.lost) for one in heard_of)
    return Checkup(tuple(looks), kept, tuple(findings), _facts(material, views, found.examples))


def verdict(done: Checkup) -> str:
    """What a person wants to read first."""
    counts = {severity: sum(one.severity == severity for one in done.findings) for severity in SEVERITIES}
    if counts["serious"]:
        rest = f", and {counted(counts['warning'], 'warning')}" if counts["warning"] else ""
        return f"{counted(counts['serious'], 'serious finding')} to mend before training{rest}"
    if counts["warning"]:
        return f"Ready to train; {counted(counts['warning'], 'thing')} would be better mended"
    return "Ready to train"


def subjects_of(views: Iterable[CroppedExample]) -> list[CheckedImage]:
    """Each picture once, with its crops at the first resolution."""
    first: dict[str, CheckedImage] = {}
    for view in views:
        first.setdefault(str(view.example.image), CheckedImage(view.example, view.crops))
    return list(first.values())


def _facts(material: Evidence, views: Sequence[CroppedExample], examples: Sequence[Example]) -> Facts:
    looks = material.measures
    by_area = sorted((look.size for look in looks), key=lambda size: size.pixels)
    copies = {index for group in material.same for index in group[1:]}
    alike = sorted(nearest([look.likeness for at, look in enumerate(material.different) if at not in copies]))
    return Facts(
        images=len(looks), regularization_images=sum(example.is_regularization for example in examples),
        samples=sum(view.example.repeats for view in views),
        smallest=str(by_area[0]), largest=str(by_area[-1]),
        buckets=tuple(bucket_uses([view for view in views if not view.example.is_regularization])),
        likeness=float(alike[len(alike) // 2]) if alike else -1.0,
        captions=sum(bool(look.subject.example.lines) for look in looks),
    )  # fmt: skip
