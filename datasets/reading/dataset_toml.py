"""A TOML list of folders, ours or kohya's -> places to read, and remarks on what of it is not followed here.

Ours:
    [[folders]]
    path = "photos"        # relative to the file, or to where the program runs
    repeats = 3            # of each picture in an epoch
    words = "zwx cat"      # the caption of pictures that have none
    regularization = false # regularization images
    masks = "photo-masks"  # a folder of masks, or "alpha" for the pictures' own transparency
    random_flip = true     # and these options of [data], for this folder alone: crop, random_flip, trigger_position,
                           # caption_lines, wildcards, shuffle_tags, keep_tags, tag_dropout, caption_dropout,
                           # caption_prefix, caption_suffix

kohya's, whose options of a subset that have a like here hold for that subset: https://github.com/kohya-ss/sd-scripts/blob/main/docs/config_README-en.md
"""

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from scumble.configs import files
from scumble.configs.errors import Refused, did_you_mean

from .caption_tables import read_kohyas
from .discovery import ImageFolder
from .sidecars import CAPTION_SUFFIXES, decoded

RULES = (
    "crop", "random_flip", "trigger_position", "caption_lines", "wildcards", "shuffle_tags", "keep_tags",
    "tag_dropout", "caption_dropout",
    "caption_prefix", "caption_suffix",
)  # fmt: skip
OURS: dict[str, type] = {"path": str, "repeats": int, "words": str, "regularization": bool, "masks": str}
FOLLOWED: dict[str, type] = {
    "image_dir": str, "num_repeats": int, "class_tokens": str, "is_reg": bool, "caption_extension": str,
    "caption_prefix": str, "caption_suffix": str, "conditioning_data_dir": str, "alpha_mask": bool,
    "metadata_file": str, "enable_wildcard": bool, "random_crop": bool,
}  # fmt: skip
OUR_NAMES = {
    "shuffle_caption": "shuffle_tags", "keep_tokens": "keep_tags", "flip_aug": "random_flip",
    "caption_dropout_rate": "caption_dropout", "caption_tag_dropout_rate": "tag_dropout",
}  # fmt: skip
BY_FLAG = {
    "resolution": "--resolution", "batch_size": "--batch-size", "bucket_no_upscale": "--no-bucket-upscale",
    "bucket_reso_steps": "--bucket-reso-steps", "min_bucket_reso": "--min-bucket-reso",
    "max_bucket_reso": "--max-bucket-reso",
}  # fmt: skip
NOT_FOLLOWED = {
    "cache_info": "sizes are read anew each time",
    "caption_dropout_every_n_epochs": "--caption-dropout empties a share of all captions instead",
    "caption_separator": "tags are parted by commas",
    "color_aug": "colours are part of what is learned",
    "custom_attributes": "nothing here reads them",
    "enable_bucket": "each picture gets a bucket of its shape",
    "face_crop_aug_range": "--crop faces keeps faces in the crop",
    "keep_tokens_separator": "--keep-tags counts tags",
    "network_multiplier": "the adapter weighs the same for all pictures",
    "resize_interpolation": "pictures are resized by Lanczos",
    "secondary_separator": "tags are parted by commas",
    "skip_image_resolution": "small pictures stay; `scumble check` names them",
    "token_warmup_min": "all tags are heard from the first step on",
    "token_warmup_step": "all tags are heard from the first step on",
    "validation_seed": "no picture is held back",
    "validation_split": "no picture is held back",
}
NOTHING = {
    "enable_bucket": True, "token_warmup_min": 1, "network_multiplier": 1.0, "cache_info": False,
    "caption_separator": ",",
}  # fmt: skip
"""Values of kohya's that ask for what happens here anyway, beside 0, false and empty ones."""


def is_list_of_folders(path: Path) -> bool:
    """Whether a TOML file lists folders, ours or kohya's, rather than options. Not where it is no TOML."""
    try:
        return bool(tomllib.loads(decoded(path.read_bytes(), path)).keys() & {"folders", "datasets"})
    except (OSError, tomllib.TOMLDecodeError, Refused):
        return False


def read_list(path: Path) -> tuple[list[ImageFolder], list[str]]:
    """The folders of a file and remarks. Raises `Refused` naming file, key and value for what cannot be meant."""
    try:
        top = tomllib.loads(decoded(path.read_bytes(), path))
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror})") from None
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"{path} is not TOML: {error}") from None
    if unknown := top.keys() - {"folders", "datasets", "general"}:
        name = min(unknown)
        raise Refused(f"{path}: no such table [{name}]{did_you_mean(name, ['folders', 'datasets', 'general'])}")
    remarks: list[str] = []
    places = [_ours(path, entry) for entry in _tables(path, top, "folders")]
    general = top.get("general", {})
    for dataset in _tables(path, top, "datasets"):
        for subset in _tables(path, dataset, "subsets"):
            own = {key: value for key, value in dataset.items() if key != "subsets"}
            places += _kohyas(path, general | own | subset, remarks)
    if not places:
        raise Refused(f"{path}: it lists no folders; name them in [[folders]] with path = …, or as kohya does")
    for place in places:
        for folder in filter(None, (place.folder, place.masks)):
            if not folder.is_dir():
                raise Refused(f"{path}: {folder}: no such folder")
    return places, list(dict.fromkeys(remarks))


def _tables(path: Path, top: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = top.get(name, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise Refused(f"{path}: {name} must be tables, each under [[{name}]]")
    return found


def _ours(path: Path, entry: Mapping[str, Any]) -> ImageFolder:
    for key in entry:
        if key not in OURS and key not in RULES:
            raise Refused(f"{path}: no such key {key} in [[folders]]{did_you_mean(key, [*OURS, *RULES])}")
    values = _typed(path, entry, OURS)
    if "path" not in values:
        raise Refused(f"{path}: [[folders]] without path; name the folder")
    masks = values.get("masks", "")
    return ImageFolder(
        _beside(path, values["path"]),
        repeats=_repeats(path, "repeats", values.get("repeats", 1)),
        words=values.get("words", "").strip(),
        is_regularization=values.get("regularization", False),
        masks=_beside(path, masks) if masks not in ("", "alpha") else None,
        alpha=masks == "alpha",
        rules=_rules(path, {key: entry[key] for key in RULES if key in entry}),
    )


def _kohyas(path: Path, entry: Mapping[str, Any], remarks: list[str]) -> list[ImageFolder]:
    """The folder of a subset, or those of the pictures that its metadata file names where it has no folder."""
    known = [*FOLLOWED, *OUR_NAMES, *BY_FLAG, *NOT_FOLLOWED]
    for key, value in entry.items():
        if key not in known:
            raise Refused(f"{path}: no such key {key} in kohya's subsets{did_you_mean(key, known)}")
        if (key in BY_FLAG or key in NOT_FOLLOWED) and value and NOTHING.get(key) != value:
            why = NOT_FOLLOWED.get(key) or f"it is one for the whole set here: give {BY_FLAG[key]}"
            remarks.append(f"{key} = {value} is not followed: {why}")
    values = _typed(path, entry, FOLLOWED)
    own: dict[str, Any] = {"crop": "random"} if values.get("random_crop") else {}
    if "enable_wildcard" in values:
        own |= {"wildcards": True, "caption_lines": "pick"} if values["enable_wildcard"] else {"wildcards": False}
    own |= {ours: entry[theirs] for theirs, ours in OUR_NAMES.items() if theirs in entry}
    folder, table = _beside(path, values["image_dir"]) if "image_dir" in values else None, None
    if named := values.get("metadata_file"):
        table = read_kohyas(_beside(path, named), folder, own.get("wildcards", False))
    elif folder is None:
        raise Refused(f"{path}: a subset without image_dir; name the folder")
    suffix = values.get("caption_extension", "")
    masks = values.get("conditioning_data_dir", "")
    place = ImageFolder(
        folder or Path(),
        repeats=_repeats(path, "num_repeats", values.get("num_repeats", 1)),
        words=values.get("class_tokens", "").strip(),
        is_regularization=values.get("is_reg", False),
        masks=_beside(path, masks) if masks else None,
        alpha=values.get("alpha_mask", False),
        suffixes=tuple(dict.fromkeys((suffix.lower(), *CAPTION_SUFFIXES))) if suffix else CAPTION_SUFFIXES,
        before=values.get("caption_prefix", "").strip(),
        after=values.get("caption_suffix", "").strip(),
        deep=table is not None and folder is not None,
        rules=_rules(path, own, {ours: theirs for theirs, ours in OUR_NAMES.items()}),
        table=table,
    )
    return [place] if folder or not table else [replace(place, folder=one) for one in table.folders()]


def _rules(
    path: Path, values: Mapping[str, Any], theirs: Mapping[str, str] = MappingProxyType({})
) -> tuple[tuple[str, Any], ...]:
    """Options of [data], checked; `theirs` are the names that they have in the file."""
    where = lambda table, key, value: f"{path}: {theirs.get(key, key)} = {value}"  # noqa: E731
    return tuple(files.validated({"data": dict(values)}, where)["data"].items())


def _typed(path: Path, entry: Mapping[str, Any], types: Mapping[str, type]) -> dict[str, Any]:
    words: dict[type, str] = {str: "text", int: "a whole number", bool: "true or false"}
    for key, value in entry.items():
        if key in types and type(value) is not types[key]:
            raise Refused(f"{path}: {key} = {value}: must be {words[types[key]]}")
    return {key: value for key, value in entry.items() if key in types}


def _beside(path: Path, value: str) -> Path:
    """A place as a file names it: relative to the file, else, as kohya's are, to where the program runs."""
    beside = path.parent / Path(value).expanduser()
    return beside if beside.exists() or not Path(value).exists() else Path(value)


def _repeats(path: Path, key: str, value: int) -> int:
    if not 1 <= value <= 10_000:
        raise Refused(f"{path}: {key} = {value}: must be a whole number from 1 to 10000")
    return value
