"""Checks of images.

Each threshold separates damaged copies from good images. tests/benchmarks/checkup.py measures the detection and false
alarm rates, with results in tests/benchmarks/results/checkup.md.
"""

from collections.abc import Iterator
from statistics import median

from scumble.configs.words import counted

from .evidence import Evidence, Observation, details_of, names_of_others
from .measure import ImageMeasures
from .watermarks import stamps_in

MIN_IMAGES = {"style": (5, 10), "character": (3, 8)}  # fewer than these are serious, a warning
UPSCALED = 1.1, 1.5  # factors above which it is a note, a warning
SOFT_PX, VERY_SOFT_PX = 1.7, 3.0
POOR_QUALITY = 50
HIGH_STEPS = 1.5  # levels, as in JPEGs of quality 40 or less
IN_CROP = 0.01  # a bar counts if it fills more than this share of the crop
DARK, LIGHT = 60, 215  # almost black: 99th percentile below; almost white: 1st percentile above
FAR_LEVELS, FAR_SIGMAS, MIN_FOR_OUTLIERS = 70, 4.0, 8
CUT = 0.25
MIN_ALIKE, SHARE_ALIKE = 4, 1 / 3


def left_out(evidence: Evidence) -> Iterator[Observation]:
    lost = [one for one in evidence.left_out if one.is_image]
    if lost:
        severity = "serious" if len(lost) > len(evidence.measures) else "warning"
        what = f"{counted(len(lost), 'image')} cannot be used"
        yield Observation(severity, what, {str(one.path): one.reason for one in lost})
    others = [one for one in evidence.left_out if not one.is_image]
    if others:
        what = counted(len(others), "other file is not used", "other files are not used")
        yield Observation("note", what, {str(one.path): one.reason for one in others})


def remarks(evidence: Evidence) -> Iterator[Observation]:
    if evidence.remarks:
        details: dict[str, str] = {}
        for one in evidence.remarks:
            details[str(one.path)] = "; ".join(filter(None, (details.get(str(one.path)), one.text)))
        what = counted(len(evidence.remarks), "remark on files that are used", "remarks on files that are used")
        yield Observation("note", what, details)


def few(evidence: Evidence) -> Iterator[Observation]:
    count = len(evidence.measures)
    minimum, recommended = MIN_IMAGES[evidence.kind]
    if count < recommended:
        severity = "serious" if count < minimum else "warning"
        yield Observation(severity, f"only {counted(count, 'image')}: a {evidence.kind} needs {recommended} or more")


def empty(evidence: Evidence) -> Iterator[Observation]:
    found = [image for image in evidence.measures if image.exposure.is_empty]
    if found:
        texts = [(image, "a single solid color") for image in found]
        yield Observation("serious", f"{counted(len(found), 'blank image')} (a single solid color)", details_of(texts))


def same_file(evidence: Evidence) -> Iterator[Observation]:
    groups = [group for group in evidence.files if len(group) > 1]
    if groups:
        count = sum(len(group) - 1 for group in groups)
        texts = [(image, f"identical to {names_of_others(image, group)}") for group in groups for image in group]
        what = counted(count, "exact copy of another image", "exact copies of other images")
        yield Observation(evidence.severity_of(count), what, details_of(texts))


def same_image(evidence: Evidence) -> Iterator[Observation]:
    groups = [[evidence.different[index] for index in group] for group in evidence.same]
    if groups:
        count = sum(len(group) - 1 for group in groups)
        texts = [(image, f"same image as {names_of_others(image, group)}") for group in groups for image in group]
        what = counted(len(groups), "image is in several files", "images are in several files")
        what += " (resized, mirrored or with different brightness)"
        yield Observation(evidence.severity_of(count), what, details_of(texts))


def marks(evidence: Evidence) -> Iterator[Observation]:
    copies = {index for group in evidence.alike for index in group[1:]}
    different = [image for index, image in enumerate(evidence.different) if index not in copies]
    places = [stamp.place for stamp in stamps_in([image.corners for image in different])]
    if places:
        what = f"most images have the same mark in the {' and the '.join(places)} corner"
        yield Observation("serious", what)


def small(evidence: Evidence) -> Iterator[Observation]:
    upscaled = [image for image in evidence.measures if image.scale > UPSCALED[0]]
    if upscaled:
        much = [image for image in upscaled if image.scale >= UPSCALED[1]]
        texts = [(image, f"{image.size}, upscaled {image.scale:.1f} times") for image in upscaled]
        worst = max(image.scale for image in upscaled)
        what = f"{counted(len(upscaled), 'image')} below the training resolution, upscaled up to {worst:.1f} times"
        yield Observation(evidence.severity_of(len(much)) if much else "note", what, details_of(texts))


def blurred(evidence: Evidence) -> Iterator[Observation]:
    soft = [image for image in evidence.measures if image.blur_px > SOFT_PX and not image.exposure.is_empty]
    if soft:
        texts = [
            (
                image,
                f"{'very ' if image.blur_px > VERY_SOFT_PX else ''}soft: sharpest edges {image.blur_px:.1f} px wide",
            )
            for image in soft
        ]
        yield Observation(evidence.severity_of(len(soft)), counted(len(soft), "blurred image"), details_of(texts))


def blocks(evidence: Evidence) -> Iterator[Observation]:
    texts = [(image, text) for image in evidence.measures if (text := _blocks(image))]
    if texts:
        what = f"{counted(len(texts), 'image')} with strong JPEG artifacts"
        yield Observation(evidence.severity_of(len(texts)), what, details_of(texts))


def borders(evidence: Evidence) -> Iterator[Observation]:
    texts = [(image, text) for image in evidence.measures if not image.exposure.is_empty and (text := _borders(image))]
    if texts:
        what = f"{counted(len(texts), 'image')} with bars or a frame"
        yield Observation(evidence.severity_of(len(texts)), what, details_of(texts))


def exposure(evidence: Evidence) -> Iterator[Observation]:
    texts = []
    for image in evidence.measures:
        if image.exposure.lightest < DARK and not image.exposure.is_empty:
            texts.append((image, "almost black"))
        elif image.exposure.darkest > LIGHT and not image.exposure.is_empty:
            texts.append((image, "almost white"))
    if texts:
        what = counted(len(texts), "image is almost black or white", "images are almost black or white")
        yield Observation("warning", what, details_of(texts))


def outliers(evidence: Evidence) -> Iterator[Observation]:
    images = [image for image in evidence.measures if not image.exposure.is_empty]
    if len(images) < MIN_FOR_OUTLIERS:
        return
    middle = median(image.exposure.mean for image in images)
    sigma = 1.4826 * median(abs(image.exposure.mean - middle) for image in images)
    far = max(FAR_LEVELS, FAR_SIGMAS * sigma)
    texts = [
        (image, f"much {'darker' if image.exposure.mean < middle else 'lighter'} than the rest")
        for image in images
        if abs(image.exposure.mean - middle) > far
        and image.exposure.lightest >= DARK
        and image.exposure.darkest <= LIGHT
    ]
    if texts:
        what = counted(
            len(texts),
            "image is much darker or lighter than the rest",
            "images are much darker or lighter than the rest",
        )
        yield Observation("note", what, details_of(texts))


def cut_off(evidence: Evidence) -> Iterator[Observation]:
    texts = [(image, f"{image.crop.cut:.0%} cropped off") for image in evidence.measures if image.crop.cut > CUT]
    if texts:
        what = counted(len(texts), "image loses", "images lose") + f" more than {CUT:.0%} to the crop"
        yield Observation("note", what, details_of(texts))


def alike(evidence: Evidence) -> Iterator[Observation]:
    different = evidence.different
    for group in evidence.alike:
        if len(group) >= max(MIN_ALIKE, SHARE_ALIKE * len(different)):
            texts = [(different[index], f"similar to {len(group) - 1} other images") for index in group]
            what = f"{len(group)} of {len(different)} images have the same layout and background"
            yield Observation("note", what, details_of(texts))


def _blocks(image: ImageMeasures) -> str:
    is_reduced = image.scale <= 0.5
    if image.quality is not None and image.quality < POOR_QUALITY and not is_reduced:
        return f"JPEG quality {image.quality}"
    return "strong JPEG artifacts" if image.block_steps >= HIGH_STEPS else ""


def _borders(image: ImageMeasures) -> str:
    """Describe the bars that remain inside the crop; empty if they are cropped off."""
    bars, crop = image.borders, image.crop
    if not bars:
        return ""
    x_scale, y_scale = crop.original.width / crop.resized.width, crop.original.height / crop.resized.height
    left, top = crop.left * x_scale, crop.top * y_scale
    right = crop.original.width - left - crop.target.width * x_scale
    bottom = crop.original.height - top - crop.target.height * y_scale
    min_width, min_height = IN_CROP * crop.target.width * x_scale, IN_CROP * crop.target.height * y_scale
    sides = [
        name
        for name, width, cut, minimum in (
            ("left", bars.left, left, min_width), ("right", bars.right, right, min_width),
            ("top", bars.top, top, min_height), ("bottom", bars.bottom, bottom, min_height),
        )
        if width - cut > minimum
    ]  # fmt: skip
    return f"bars ({', '.join(sides)})" if sides else ""
