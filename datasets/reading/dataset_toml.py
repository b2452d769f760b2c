"""Reads a TOML list of folders, ours or kohya's, and notes what is ignored.

Ours:
    [[folders]]
    path = "photos"        # relative to this file, or else to the working directory
    repeats = 3            # times that each image is used per epoch
    words = "zwx cat"      # the caption of images without one
    regularization = false # whether these are regularization images
    masks = "photo-masks"  # a folder of masks, or "alpha" for the alpha channel of each image
    random_flip = true     # and these options of [data], for this folder only: crop, random_flip, trigger_position,
                           # caption_lines, wildcards, shuffle_tags, keep_tags, tag_dropout, caption_dropout,
                           # caption_prefix, caption_suffix

kohya's, where subset options with an equivalent apply to that subset only:
https://github.com/kohya-ss/sd-scripts/blob/main/docs/config_README-en.md
"""

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from scumble.configs import files
from scumble.configs.errors import Refused, did_you_mean

from .caption_tables import read_kohya_metadata
from .discovery import ImageFolder
from .sidecars import CAPTION_SUFFIXES, decoded

RULES = (
    "crop", "random_flip", "trigger_position", "caption_lines", "wildcards", "shuffle_tags", "keep_tags",
    "tag_dropout", "caption_dropout",
    "caption_prefix", "caption_suffix",
)  # fmt: skip
OUR_KEYS: dict[str, type] = {"path": str, "repeats": int, "words": str, "regularization": bool, "masks": str}
SUPPORTED: dict[str, type] = {
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
IGNORED = {
    "cache_info": "image sizes are read on every run",
    "caption_dropout_every_n_epochs": "use --caption-dropout, which drops a share of all captions",
    "caption_separator": "tags are separated by commas",
    "color_aug": "colors are part of what the adapter learns",
    "custom_attributes": "nothing reads them",
    "enable_bucket": "every image is assigned to a bucket of its aspect ratio",
    "face_crop_aug_range": "use --crop faces, which keeps faces inside the crop",
    "keep_tokens_separator": "use --keep-tags, which counts tags",
    "network_multiplier": "the adapter has the same strength for all images",
    "resize_interpolation": "images are resized with Lanczos",
    "secondary_separator": "tags are separated by commas",
    "skip_image_resolution": "small images are kept; `scumble check` lists them",
    "token_warmup_min": "all tags are used from the first step",
    "token_warmup_step": "all tags are used from the first step",
    "validation_seed": "--seed also chooses the validation images",
    "validation_split": "it applies to the whole dataset; use --validation-split",
}
NO_EFFECT = {
    "enable_bucket": True, "token_warmup_min": 1, "network_multiplier": 1.0, "cache_info": False,
    "caption_separator": ",",
}  # fmt: skip
"""Values of ignored kohya keys that request the behavior here, besides 0, false and empty values."""


def is_list_of_folders(path: Path) -> bool:
    """Whether a TOML file lists folders, ours or kohya's, rather than options. False if it is not valid TOML."""
    try:
        return bool(tomllib.loads(decoded(path.read_bytes(), path)).keys() & {"folders", "datasets"})
    except (OSError, tomllib.TOMLDecodeError, Refused):
        return False


def read_list(path: Path) -> tuple[list[ImageFolder], list[str]]:
    """Return the folders of a file and remarks. Raises `Refused` naming the file, key and value of an invalid entry."""
    try:
        top = tomllib.loads(decoded(path.read_bytes(), path))
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror})") from None
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"{path}: is not TOML ({error})") from None
    if unknown := top.keys() - {"folders", "datasets", "general"}:
        name = min(unknown)
        raise Refused(f"{path}: no such table [{name}]{did_you_mean(name, ['folders', 'datasets', 'general'])}")
    remarks: list[str] = []
    folders = [_our_folder(path, entry) for entry in _tables(path, top, "folders")]
    general = top.get("general", {})
    for dataset in _tables(path, top, "datasets"):
        for subset in _tables(path, dataset, "subsets"):
            defaults = {key: value for key, value in dataset.items() if key != "subsets"}
            folders += _kohya_folders(path, general | defaults | subset, remarks)
    if not folders:
        raise Refused(f"{path}: lists no folders; add [[folders]] with path = …, or kohya's [[datasets.subsets]]")
    for folder in folders:
        for place in filter(None, (folder.path, folder.masks)):
            if not place.is_dir():
                raise Refused(f"{path}: {place}: no such folder")
    return folders, list(dict.fromkeys(remarks))


def _tables(path: Path, top: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = top.get(name, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise Refused(f"{path}: {name}: must be tables, each headed [[{name}]]")
    return found


def _our_folder(path: Path, entry: Mapping[str, Any]) -> ImageFolder:
    for key in entry:
        if key not in OUR_KEYS and key not in RULES:
            raise Refused(f"{path}: no such key {key} in [[folders]]{did_you_mean(key, [*OUR_KEYS, *RULES])}")
    values = _typed(path, entry, OUR_KEYS)
    if "path" not in values:
        raise Refused(f"{path}: [[folders]]: has no path; add path = …")
    masks = values.get("masks", "")
    return ImageFolder(
        _resolved(path, values["path"]),
        repeats=_repeats(path, "repeats", values.get("repeats", 1)),
        words=values.get("words", "").strip(),
        is_regularization=values.get("regularization", False),
        masks=_resolved(path, masks) if masks not in ("", "alpha") else None,
        alpha=masks == "alpha",
        rules=_rules(path, {key: entry[key] for key in RULES if key in entry}),
    )


def _kohya_folders(path: Path, entry: Mapping[str, Any], remarks: list[str]) -> list[ImageFolder]:
    """Return the folder of a subset or, without image_dir, the folders of the images in its metadata file."""
    known = [*SUPPORTED, *OUR_NAMES, *BY_FLAG, *IGNORED]
    for key, value in entry.items():
        if key not in known:
            raise Refused(f"{path}: no such key {key} in kohya's subsets{did_you_mean(key, known)}")
        if (key in BY_FLAG or key in IGNORED) and value and NO_EFFECT.get(key) != value:
            reason = IGNORED.get(key) or f"it applies to the whole dataset; use {BY_FLAG[key]}"
            remarks.append(f"{key} = {value} is ignored: {reason}")
    values = _typed(path, entry, SUPPORTED)
    rules: dict[str, Any] = {"crop": "random"} if values.get("random_crop") else {}
    if "enable_wildcard" in values:
        rules |= {"wildcards": True, "caption_lines": "pick"} if values["enable_wildcard"] else {"wildcards": False}
    rules |= {ours: entry[theirs] for theirs, ours in OUR_NAMES.items() if theirs in entry}
    folder, table = _resolved(path, values["image_dir"]) if "image_dir" in values else None, None
    if metadata := values.get("metadata_file"):
        table = read_kohya_metadata(_resolved(path, metadata), folder, rules.get("wildcards", False))
    elif folder is None:
        raise Refused(f"{path}: [[datasets.subsets]]: has no image_dir; add image_dir = …")
    extension = values.get("caption_extension", "")
    masks = values.get("conditioning_data_dir", "")
    found = ImageFolder(
        folder or Path(),
        repeats=_repeats(path, "num_repeats", values.get("num_repeats", 1)),
        words=values.get("class_tokens", "").strip(),
        is_regularization=values.get("is_reg", False),
        masks=_resolved(path, masks) if masks else None,
        alpha=values.get("alpha_mask", False),
        suffixes=tuple(dict.fromkeys((extension.lower(), *CAPTION_SUFFIXES))) if extension else CAPTION_SUFFIXES,
        prefix=values.get("caption_prefix", "").strip(),
        suffix=values.get("caption_suffix", "").strip(),
        recursive=table is not None and folder is not None,
        rules=_rules(path, rules, {ours: theirs for theirs, ours in OUR_NAMES.items()}),
        table=table,
    )
    return [found] if folder or not table else [replace(found, path=one) for one in table.folders()]


def _rules(
    path: Path, values: Mapping[str, Any], names: Mapping[str, str] = MappingProxyType({})
) -> tuple[tuple[str, Any], ...]:
    """Return validated options of [data]; `names` maps them to the names in the file, for error messages."""
    where = lambda table, key, value: f"{path}: {names.get(key, key)} = {value}"  # noqa: E731
    return tuple(files.validated({"data": dict(values)}, where)["data"].items())


def _typed(path: Path, entry: Mapping[str, Any], types: Mapping[str, type]) -> dict[str, Any]:
    names: dict[type, str] = {str: "a string", int: "a whole number", bool: "true or false"}
    for key, value in entry.items():
        if key in types and type(value) is not types[key]:
            raise Refused(f"{path}: {key} = {value}: must be {names[types[key]]}")
    return {key: value for key, value in entry.items() if key in types}


def _resolved(path: Path, value: str) -> Path:
    """Return a path relative to the file or, as kohya does, to the working directory if only that one exists."""
    relative = path.parent / Path(value).expanduser()
    return relative if relative.exists() or not Path(value).exists() else Path(value)


def _repeats(path: Path, key: str, value: int) -> int:
    if not 1 <= value <= 10_000:
        raise Refused(f"{path}: {key} = {value}: must be a whole number from 1 to 10000")
    return value
