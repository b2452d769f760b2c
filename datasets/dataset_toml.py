"""A TOML list of folders, ours or kohya's -> places to read, and remarks on what of it is not followed here.

Ours:
    [[folders]]
    path = "photos"        # relative to the file, or to where the program runs
    repeats = 3            # of each picture in an epoch
    words = "zwx cat"      # the caption of pictures that have none
    prior = false          # regularisation pictures
    masks = "photo-masks"  # a folder of masks, or "alpha" for the pictures' own transparency

kohya's: https://github.com/kohya-ss/sd-scripts/blob/main/docs/config_README-en.md
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scumble.configs.errors import Refused, nearest

from .places import Place
from .sidecars import CAPTION_SUFFIXES, decoded

OURS: dict[str, type] = {"path": str, "repeats": int, "words": str, "prior": bool, "masks": str}
FOLLOWED: dict[str, type] = {
    "image_dir": str, "num_repeats": int, "class_tokens": str, "is_reg": bool, "caption_extension": str,
    "caption_prefix": str, "caption_suffix": str, "conditioning_data_dir": str, "alpha_mask": bool,
}  # fmt: skip
BY_FLAG = {
    "resolution": "--resolution", "batch_size": "--batch", "shuffle_caption": "--shuffle-tags",
    "keep_tokens": "--keep-tags", "flip_aug": "--flip", "random_crop": "--crop random",
    "caption_dropout_rate": "--caption-dropout", "caption_tag_dropout_rate": "--tag-dropout",
    "enable_wildcard": "--caption-lines pick", "bucket_no_upscale": "--no-upscale",
    "bucket_reso_steps": "--bucket-step", "min_bucket_reso": "--min-side", "max_bucket_reso": "--max-side",
}  # fmt: skip
NOT_FOLLOWED = {
    "cache_info", "caption_dropout_every_n_epochs", "caption_separator", "color_aug",
    "custom_attributes", "enable_bucket", "face_crop_aug_range", "keep_tokens_separator",
    "metadata_file", "network_multiplier", "resize_interpolation", "secondary_separator", "skip_image_resolution",
    "token_warmup_min", "token_warmup_step", "validation_seed", "validation_split",
}  # fmt: skip
NOTHING = {"enable_bucket": True, "token_warmup_min": 1, "network_multiplier": 1.0, "cache_info": False}
"""Values of kohya's that ask for what happens here anyway, beside 0, false and empty ones."""


def is_list_of_folders(path: Path) -> bool:
    """Whether a TOML file lists folders, ours or kohya's, rather than options. Not where it is no TOML."""
    try:
        return bool(tomllib.loads(decoded(path.read_bytes(), path)).keys() & {"folders", "datasets"})
    except (OSError, tomllib.TOMLDecodeError, Refused):
        return False


def read_list(path: Path) -> tuple[list[Place], list[str]]:
    """The folders of a file and remarks. Raises `Refused` naming file, key and value for what cannot be meant."""
    try:
        top = tomllib.loads(decoded(path.read_bytes(), path))
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror})") from None
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"{path} is not TOML: {error}") from None
    if unknown := top.keys() - {"folders", "datasets", "general"}:
        name = min(unknown)
        raise Refused(f"{path}: no such table [{name}]{nearest(name, ['folders', 'datasets', 'general'])}")
    remarks: list[str] = []
    places = [_ours(path, entry) for entry in _tables(path, top, "folders")]
    general = top.get("general", {})
    for dataset in _tables(path, top, "datasets"):
        for subset in _tables(path, dataset, "subsets"):
            own = {key: value for key, value in dataset.items() if key != "subsets"}
            places.append(_kohyas(path, general | own | subset, remarks))
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


def _ours(path: Path, entry: Mapping[str, Any]) -> Place:
    for key in entry:
        if key not in OURS:
            raise Refused(f"{path}: no such key {key} in [[folders]]{nearest(key, list(OURS))}")
    values = _typed(path, entry, OURS)
    if "path" not in values:
        raise Refused(f"{path}: [[folders]] without path; name the folder")
    masks = values.get("masks", "")
    return Place(
        _folder(path, values["path"]),
        repeats=_repeats(path, "repeats", values.get("repeats", 1)),
        words=values.get("words", "").strip(),
        prior=values.get("prior", False),
        masks=_folder(path, masks) if masks not in ("", "alpha") else None,
        alpha=masks == "alpha",
    )


def _kohyas(path: Path, entry: Mapping[str, Any], remarks: list[str]) -> Place:
    known = [*FOLLOWED, *BY_FLAG, *NOT_FOLLOWED]
    for key, value in entry.items():
        if key not in known:
            raise Refused(f"{path}: no such key {key} in kohya's subsets{nearest(key, known)}")
        if key not in FOLLOWED and value and NOTHING.get(key) != value:
            cure = f"give {BY_FLAG[key]} instead" if key in BY_FLAG else "there is no such thing here"
            remarks.append(f"{key} = {value} is not followed: {cure}")
    values = _typed(path, entry, FOLLOWED)
    if "image_dir" not in values:
        raise Refused(f"{path}: a subset without image_dir; name the folder")
    suffix = values.get("caption_extension", "")
    masks = values.get("conditioning_data_dir", "")
    return Place(
        _folder(path, values["image_dir"]),
        repeats=_repeats(path, "num_repeats", values.get("num_repeats", 1)),
        words=values.get("class_tokens", "").strip(),
        prior=values.get("is_reg", False),
        masks=_folder(path, masks) if masks else None,
        alpha=values.get("alpha_mask", False),
        suffixes=tuple(dict.fromkeys((suffix.lower(), *CAPTION_SUFFIXES))) if suffix else CAPTION_SUFFIXES,
        before=values.get("caption_prefix", "").strip(),
        after=values.get("caption_suffix", "").strip(),
        deep=False,
    )


def _typed(path: Path, entry: Mapping[str, Any], types: Mapping[str, type]) -> dict[str, Any]:
    words: dict[type, str] = {str: "text", int: "a whole number", bool: "true or false"}
    for key, value in entry.items():
        if key in types and type(value) is not types[key]:
            raise Refused(f"{path}: {key} = {value}: must be {words[types[key]]}")
    return {key: value for key, value in entry.items() if key in types}


def _folder(path: Path, value: str) -> Path:
    """A folder as a file names it: relative to the file, else, as kohya's are, to where the program runs."""
    beside = path.parent / Path(value).expanduser()
    return beside if beside.is_dir() or not Path(value).is_dir() else Path(value)


def _repeats(path: Path, key: str, value: int) -> int:
    if not 1 <= value <= 10_000:
        raise Refused(f"{path}: {key} = {value}: must be a whole number from 1 to 10000")
    return value
