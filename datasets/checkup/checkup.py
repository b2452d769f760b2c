"""The check-up of a dataset before training: what was found, why it matters and how to fix it.

`CHECKS` is the table of all checks. A flaw of individual images is a warning, but serious in more than a third of the
dataset, since training learns what that many images share.
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

FEW = 1000  # images whose thumbnails and corners are kept in memory: about 45 MB
SEVERITIES: tuple[Severity, ...] = ("serious", "warning", "note")
OF_FILES = {"left out", "remarks"}  # checks that list all files, since no image on the page shows them


@dataclass(frozen=True)
class Check:
    """One check. Texts are shown as "WHAT WAS FOUND; WHY; CURE": lower case, without a period at the end."""

    name: str
    why: str
    cure: str
    find: Callable[[Evidence], Iterator[Observation]]


CHECKS = (
    Check(
        "left out", "these files are not used for training",
        "fix the problem given for each file, or remove the file", picture_checks.left_out,
    ),
    Check(
        "remarks", "these files are used, but perhaps not in the way you intended",
        "read each remark, and change the file if you want something else", picture_checks.remarks,
    ),
    Check(
        "few images", "with few images, the adapter memorizes them instead of learning what they have in common",
        "add images that differ from each other (mirroring with --random-flip helps a little)", picture_checks.few,
    ),
    Check(
        "blank image", "a blank image teaches nothing, and its caption comes to mean an empty area",
        "remove it", picture_checks.empty,
    ),
    Check(
        "duplicate file", "a duplicate image has twice the weight in training, and tends to appear for any prompt",
        "keep one copy of each, or set repeats if you want to train more on an image", picture_checks.same_file,
    ),
    Check(
        "duplicate image", "a duplicate image has twice the weight in training, and tends to appear for any prompt",
        "keep the best file of each: the larger and cleaner one", picture_checks.same_image,
    ),
    Check(
        "watermark", "a signature, watermark or date in many images is learned, and appears in the corner of generated "
        "images", "crop it off or retouch it, or mention it in every caption ('signature') if it must stay",
        picture_checks.marks,
    ),
    Check(
        "low resolution", "upscaled images are soft, and the adapter learns this softness",
        "find larger files, use an AI upscaler, or lower --resolution", picture_checks.small,
    ),
    Check(
        "blur", "even the sharpest edges are soft at training resolution, so generated images will be soft too",
        "use a sharper image, unless softness is part of the style", picture_checks.blurred,
    ),
    Check(
        "JPEG artifacts", "the blocks and ringing of strong compression are learned like any other texture",
        "find the original file (saving the image again does not remove the artifacts)", picture_checks.blocks,
    ),
    Check(
        "borders", "bars and frames are learned as part of every image", "crop them off", picture_checks.borders,
    ),
    Check(
        "exposure", "an almost black or white image has little detail to learn from",
        "correct the exposure, or remove the image", picture_checks.exposure,
    ),
    Check(
        "brightness outlier", "an image that is much darker or lighter than the rest shifts the whole style",
        "adjust its brightness, or mention the light in its caption ('at night')", picture_checks.outliers,
    ),
    Check(
        "heavy crop", "training only sees the part of an image inside its crop",
        "look at the crops on the page, and crop the image yourself or try --crop focus", picture_checks.cut_off,
    ),
    Check(
        "similar images", "what stays the same (pose, background, framing) is learned as part of the subject",
        "add other poses, distances and backgrounds, or describe in the captions what stays the same",
        picture_checks.alike,
    ),
    Check(
        "no caption", "without a caption, everything in an image becomes part of the trigger",
        caption_checks.WRITE_CAPTION, caption_checks.missing,
    ),
    Check(
        "duplicate caption", "different images with the same caption give the model no words to tell them apart",
        "describe what differs", caption_checks.alike,
    ),
    Check(
        "long caption", "the text encoder ignores everything beyond its token limit",
        "shorten the caption, or put the most important words first", caption_checks.long,
    ),
    Check(
        "missing trigger", "the trigger activates the adapter, so it is added to every caption that lacks it",
        "write it into these captions yourself if you want it in another place", caption_checks.trigger,
    ),
    Check(
        "no trigger", "without a word of its own, a character mixes with what the base model already associates with "
        "the words in its captions", "set --trigger to a rare word, or add one to every caption",
        caption_checks.uncalled,
    ),
    Check(
        "shared tags", "a tag in every caption comes to mean everything that the images share, like a trigger",
        "keep a tag that is your trigger, but remove others whose meaning should not change", caption_checks.shared,
    ),
    Check(
        "spelling variants", "the model learns two spellings as two different things",
        "use one spelling everywhere: `scumble captions replace`", caption_checks.spellings,
    ),
    Check(
        "rare tags", "a tag in one caption only is learned from that image alone",
        "check for typos, and keep the tags of things that appear only once", caption_checks.once,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One finding. `details` maps the path of each affected image or file to a text about it."""

    check: str
    severity: Severity
    what: str
    why: str
    cure: str
    details: dict[str, str]


@dataclass(frozen=True)
class Facts:
    """A summary of the dataset.

    `likeness` is the median, over the images, of the correlation with the most similar other image, from -1 to 1.
    Copies count as one image.
    """

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
        """How much the images differ from each other: zero (for one image), low, medium or high."""
        return "zero" if self.images < 2 else next(
            word for least, word in ((0.9, "low"), (0.75, "medium"), (-1.0, "high")) if self.likeness >= least - 1e-6
        )  # fmt: skip


@dataclass(frozen=True)
class Checkup:
    """The complete check-up. `measures` and `caption_texts` have one entry per image; serious `findings` come first.

    An entry of `caption_texts` is the part of a caption that the text encoder reads, and the part beyond its limit.
    """

    measures: tuple[ImageMeasures, ...]
    caption_texts: tuple[tuple[str, str], ...]
    findings: tuple[Finding, ...]
    facts: Facts

    @property
    def is_serious(self) -> bool:
        return any(finding.severity == "serious" for finding in self.findings)

    def findings_for(self, path: str) -> list[Finding]:
        """Return the findings that affect one image."""
        return [finding for finding in self.findings if path in finding.details]


def check_images(
    found: ImageSet,
    cropped: Sequence[CroppedExample],
    *,
    kind: Literal["style", "character"],
    trigger: str,
    windows: Sequence[Window],
    caption_text: Callable[[Example], str],
    with_thumbs: bool = True,
    progress: Callable[[int], None] = lambda done: None,
) -> Checkup:
    """Check every image and caption of a dataset. Regularization images are counted but not checked.

    `caption_text` returns the caption text of an example as training uses it; `progress` is called with the number of
    images measured so far. Raises `Refused` naming an image that can no longer be read.
    """
    subjects = subjects_of(one for one in cropped if not one.example.is_regularization)
    measures = []
    with_thumbs = with_thumbs and len(subjects) <= FEW  # of a larger set, the images that are shown are read again
    for measured in measure_images(subjects, with_thumbs):
        measures.append(measured if len(measures) < FEW else replace(measured, corners=Corners(None)))
        progress(len(measures))
    captions = [caption_text(subject.example) for subject in subjects]
    evidence = Evidence(
        tuple(measures), tuple(found.left_out), tuple(found.remarks), kind, trigger, tuple(windows), tuple(captions)
    )
    findings = [
        Finding(check.name, one.severity, one.what, check.why, one.cure or check.cure, one.details)
        for check in CHECKS
        for one in check.find(evidence)
    ]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    counts = [evidence.count_tokens(text) for text in captions]
    caption_texts = tuple((count.kept, count.lost) for count in counts)
    return Checkup(tuple(measures), caption_texts, tuple(findings), _facts(evidence, cropped, found.examples))


def verdict(done: Checkup) -> str:
    """Return the one-line summary of a check-up."""
    counts = {severity: sum(one.severity == severity for one in done.findings) for severity in SEVERITIES}
    if counts["serious"]:
        rest = f", and {counted(counts['warning'], 'warning')}" if counts["warning"] else ""
        return f"{counted(counts['serious'], 'serious problem')} to fix before training{rest}"
    if counts["warning"]:
        return f"Ready to train, with {counted(counts['warning'], 'warning')}"
    return "Ready to train"


def subjects_of(cropped: Iterable[CroppedExample]) -> list[CheckedImage]:
    """Return each image once, with its crops at the first resolution."""
    first: dict[str, CheckedImage] = {}
    for one in cropped:
        first.setdefault(str(one.example.image), CheckedImage(one.example, one.crops))
    return list(first.values())


def _facts(evidence: Evidence, cropped: Sequence[CroppedExample], examples: Sequence[Example]) -> Facts:
    measures = evidence.measures
    by_area = sorted((measured.size for measured in measures), key=lambda size: size.pixels)
    copies = {index for group in evidence.same for index in group[1:]}
    likenesses = [measured.likeness for index, measured in enumerate(evidence.different) if index not in copies]
    correlations = sorted(nearest(likenesses))
    return Facts(
        images=len(measures), regularization_images=sum(example.is_regularization for example in examples),
        samples=sum(one.example.repeats for one in cropped),
        smallest=str(by_area[0]), largest=str(by_area[-1]),
        buckets=tuple(bucket_uses([one for one in cropped if not one.example.is_regularization])),
        likeness=float(correlations[len(correlations) // 2]) if correlations else -1.0,
        captions=sum(bool(measured.subject.example.lines) for measured in measures),
    )  # fmt: skip
