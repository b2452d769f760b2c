"""Checks of pictures. Thresholds are those at which damaged copies are told from good pictures, sharp from soft ones:
tests/benchmarks/checkup.py measures both rates, and its results lie beside it.
"""

from collections.abc import Iterator
from statistics import median

from scumble.configs.words import counted

from .evidence import Evidence, Observation, details, others
from .measure import ImageMeasures
from .watermarks import stamps_in

ENOUGH = {"style": (5, 10), "character": (3, 8)}  # fewer are serious, worth a warning
ENLARGED = 1.1, 1.5  # from here a note, a warning
SOFT_PX, VERY_SOFT_PX = 1.7, 3.0
POOR_QUALITY = 50
HIGH_STEPS = 1.5  # levels, as JPEG leaves them at quality 40 and under
IN_CROP = 0.01  # share of a crop's side that a bar must fill
DARK, LIGHT = 60, 215  # level that a hundredth is above, below
FAR_PIXELS, FAR_SIGMAS, FEWEST_FOR_OUTLIERS = 70, 4.0, 8
CUT = 0.25
FEWEST_ALIKE, SHARE_ALIKE = 4, 1 / 3


def left_out(material: Evidence) -> Iterator[Observation]:
    lost = [one for one in material.left_out if one.is_image]
    if lost:
        severity = "serious" if len(lost) > len(material.measures) else "warning"
        what = f"{counted(len(lost), 'picture')} cannot be used"
        yield Observation(severity, what, {str(one.path): one.reason for one in lost})
    others = [one for one in material.left_out if not one.is_image]
    if others:
        yield Observation(
            "note", f"{counted(len(others), 'other file')} not used", {str(o.path): o.reason for o in others}
        )


def remarks(material: Evidence) -> Iterator[Observation]:
    if material.remarks:
        told: dict[str, str] = {}
        for one in material.remarks:
            told[str(one.path)] = "; ".join(filter(None, (told.get(str(one.path)), one.text)))
        yield Observation(
            "note",
            counted(len(material.remarks), "remark on files that are used", "remarks on files that are used"),
            told,
        )


def few(material: Evidence) -> Iterator[Observation]:
    count = len(material.measures)
    least, enough = ENOUGH[material.kind]
    if count < enough:
        severity = "serious" if count < least else "warning"
        yield Observation(severity, f"{counted(count, 'picture')}: a {material.kind} wants {enough} or more")


def empty(material: Evidence) -> Iterator[Observation]:
    found = [look for look in material.measures if look.exposure.is_empty]
    if found:
        told = [(look, "one colour all over") for look in found]
        yield Observation("serious", f"{counted(len(found), 'picture')} of one colour all over", details(told))


def same_file(material: Evidence) -> Iterator[Observation]:
    groups = [group for group in material.files if len(group) > 1]
    if groups:
        count = sum(len(group) - 1 for group in groups)
        told = [(look, f"the same file as {others(look, group)}") for group in groups for look in group]
        yield Observation(material.spread(count), f"{counted(count, 'exact copy', 'exact copies')}", details(told))


def same_picture(material: Evidence) -> Iterator[Observation]:
    groups = [[material.different[index] for index in group] for group in material.same]
    if groups:
        count = sum(len(group) - 1 for group in groups)
        told = [(look, f"shows the same as {others(look, group)}") for group in groups for look in group]
        stands = counted(len(groups), "picture stands", "pictures stand")
        what = f"{stands} in more than one file (other size, light or mirrored)"
        yield Observation(material.spread(count), what, details(told))


def marks(material: Evidence) -> Iterator[Observation]:
    copies = {index for group in material.alike for index in group[1:]}
    different = [look for index, look in enumerate(material.different) if index not in copies]
    places = [stamp.place for stamp in stamps_in([look.corners for look in different])]
    if places:
        yield Observation("serious", f"one mark stands in the {' and the '.join(places)} of most pictures")


def small(material: Evidence) -> Iterator[Observation]:
    enlarged = [look for look in material.measures if look.scale > ENLARGED[0]]
    if enlarged:
        much = [look for look in enlarged if look.scale >= ENLARGED[1]]
        told = [(look, f"{look.size}, enlarged {look.scale:.1f} times") for look in enlarged]
        worst = max(look.scale for look in enlarged)
        what = f"{counted(len(enlarged), 'picture')} smaller than what training wants, enlarged up to {worst:.1f} times"
        yield Observation(material.spread(len(much)) if much else "note", what, details(told))


def blurred(material: Evidence) -> Iterator[Observation]:
    soft = [look for look in material.measures if look.blur_px > SOFT_PX and not look.exposure.is_empty]
    if soft:
        told = [
            (look, f"{'very ' if look.blur_px > VERY_SOFT_PX else ''}soft: sharpest edges {look.blur_px:.1f} px wide")
            for look in soft
        ]
        yield Observation(material.spread(len(soft)), counted(len(soft), "blurred picture"), details(told))


def blocks(material: Evidence) -> Iterator[Observation]:
    told = [(look, text) for look in material.measures if (text := _blocks(look))]
    if told:
        what = f"{counted(len(told), 'picture')} with marks of strong JPEG compression"
        yield Observation(material.spread(len(told)), what, details(told))


def borders(material: Evidence) -> Iterator[Observation]:
    told = [(look, text) for look in material.measures if not look.exposure.is_empty and (text := _borders(look))]
    if told:
        yield Observation(
            material.spread(len(told)), f"{counted(len(told), 'picture')} in bars or a frame", details(told)
        )


def exposure(material: Evidence) -> Iterator[Observation]:
    told = []
    for look in material.measures:
        if look.exposure.lightest < DARK and not look.exposure.is_empty:
            told.append((look, "almost black"))
        elif look.exposure.darkest > LIGHT and not look.exposure.is_empty:
            told.append((look, "almost white"))
    if told:
        yield Observation("warning", f"{counted(len(told), 'picture')} almost black or white", details(told))


def outliers(material: Evidence) -> Iterator[Observation]:
    looks = [look for look in material.measures if not look.exposure.is_empty]
    if len(looks) < FEWEST_FOR_OUTLIERS:
        return
    middle = median(look.exposure.mean for look in looks)
    usual = 1.4826 * median(abs(look.exposure.mean - middle) for look in looks)
    far = max(FAR_PIXELS, FAR_SIGMAS * usual)
    told = [
        (look, f"far {'darker' if look.exposure.mean < middle else 'lighter'} than the rest")
        for look in looks
        if abs(look.exposure.mean - middle) > far and look.exposure.lightest >= DARK and look.exposure.darkest <= LIGHT
    ]
    if told:
        yield Observation("note", f"{counted(len(told), 'picture')} far darker or lighter than the rest", details(told))


def cut_off(material: Evidence) -> Iterator[Observation]:
    told = [(look, f"{look.crop.cut:.0%} is cut off") for look in material.measures if look.crop.cut > CUT]
    if told:
        yield Observation(
            "note", f"{counted(len(told), 'picture')} of which more than {CUT:.0%} is cut off", details(told)
        )


def alike(material: Evidence) -> Iterator[Observation]:
    firsts = material.different
    for group in material.alike:
        if len(group) >= max(FEWEST_ALIKE, SHARE_ALIKE * len(firsts)):
            told = [(firsts[index], f"looks like {len(group) - 1} others") for index in group]
            yield Observation(
                "note", f"{len(group)} of {len(firsts)} pictures have the same shape and ground", details(told)
            )


def _blocks(look: ImageMeasures) -> str:
    reduced = look.scale <= 0.5
    if look.quality is not None and look.quality < POOR_QUALITY and not reduced:
        return f"JPEG of quality {look.quality}"
    return "blocks of strong JPEG compression" if look.block_steps >= HIGH_STEPS else ""


def _borders(look: ImageMeasures) -> str:
    """What of the bars the crops keep, in words; nothing where they are cut away."""
    bars, crop = look.borders, look.crop
    if not bars:
        return ""
    across, down = crop.original.width / crop.resized.width, crop.original.height / crop.resized.height
    left, top = crop.left * across, crop.top * down
    right = crop.original.width - left - crop.target.width * across
    bottom = crop.original.height - top - crop.target.height * down
    wide, high = IN_CROP * crop.target.width * across, IN_CROP * crop.target.height * down
    sides = [
        name
        for name, width, cut, least in (
            ("left", bars.left, left, wide), ("right", bars.right, right, wide),
            ("above", bars.top, top, high), ("below", bars.bottom, bottom, high),
        )
        if width - cut > least
    ]  # fmt: skip
    return f"bars {', '.join(sides)}" if sides else ""
