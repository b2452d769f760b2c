"""Fingerprints of options, base and images, and the differences between a run and its continuation."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scumble.configs.options import Options
from scumble.datasets.reading.folder import Example
from scumble.datasets.reading.images import Crop, digest_of_file

from ..adapters.targets import LAYOUT
from ..base_model.detect import DetectedBase

SAMPLES, SAMPLE_BYTES = 64, 1 << 20
FREE = {
    "model.base",
    "model.vae",
    "data.images",
    "data.regularization_images",
}  # locations; their content is compared instead
FREE_TABLES = {"previews", "output"}
FIXED = {
    "model.prediction_type", "model.zero_terminal_snr", "optimization.optimizer", "output.seed",
    "optimization.ema_decay", "data.resolution", "data.validation_split",
}  # fmt: skip
FIXED_TABLES = {"network"}


def identity_of(
    source: DetectedBase, options: Options, examples: Sequence[Example], crops: Sequence[Sequence[Crop]]
) -> dict[str, Any]:
    """The identity of a run: its options, its base, and each image with caption and crop."""
    return {
        "options": options.model_dump(mode="json", warnings=False),  # 16 is fine for a float field
        "base": fingerprint_of_base(Path(source.path)),
        "layout": LAYOUT,
        "pictures": fingerprints_of(examples, crops, Path(options.data.images)),
    }


def fingerprint_of_base(place: Path) -> str:
    """Hash a file, or all weights in a folder: sizes, and up to 64 MiB of samples spread over each file."""
    digest = hashlib.blake2b(digest_size=16)
    for path in [place] if place.is_file() else sorted(place.rglob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(place)}/{size}".encode())
        with path.open("rb") as file:
            if size <= SAMPLES * SAMPLE_BYTES:
                digest.update(file.read())
            else:
                for number in range(SAMPLES):
                    file.seek(number * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def fingerprints_of(examples: Sequence[Example], crops: Sequence[Sequence[Crop]], folder: Path) -> dict[str, str]:
    """Digest of each image (bytes, mask, caption, repeats, crops) by its path in `folder`, or else its name."""
    found: dict[str, str] = {}
    for example, crops_of_image in zip(examples, crops, strict=True):
        content = [example.digest]
        if example.mask:
            content.append(digest_of_file(example.mask))
        text = f"{content}/{example.caption}/{example.repeats}/{example.is_regularization}/{crops_of_image}"
        text += f"/{example.rules}" if example.rules else ""
        inside = example.image.is_relative_to(folder)
        name = example.image.relative_to(folder).as_posix() if inside else example.image.name
        found[name] = hashlib.blake2b(f"{found.get(name, '')}{text}".encode(), digest_size=16).hexdigest()
    return found


def refused_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Changes that a run cannot resume with, because its adapter or its optimizer state would no longer fit."""
    is_other_layout = before.get("layout") != now["layout"]
    lines = ["optimizer state: the run uses the layout of another scumble version"] if is_other_layout else []
    return lines + [
        f"{flag_of(key)} {new}: the run uses {old}"
        for key, old, new in _changed(before, now)
        if key in FIXED or key.partition(".")[0] in FIXED_TABLES
    ]


def doubtful_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A different base or different images. The run can resume with them if that is intended."""
    lines = [] if before["base"] == now["base"] else ["the base was replaced"]
    old, new = before["pictures"], now["pictures"]
    lines += [f"{name} was removed" for name in old if name not in new]
    lines += [f"{name} was added" for name in new if name not in old]
    lines += [
        f"{name}: image, caption, repeats or crop changed" for name in old if new.get(name, old[name]) != old[name]
    ]
    return lines


def allowed_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Option changes that a run can resume with. Its result then differs from that of an unchanged run."""
    return [
        f"{flag_of(key)} {new} instead of {old}"
        for key, old, new in _changed(before, now)
        if key not in FREE | FIXED and key.partition(".")[0] not in FREE_TABLES | FIXED_TABLES
    ]


def flag_of(key: str) -> str:
    return "--" + key.partition(".")[2].replace("_", "-")


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    old, new = before["options"], now["options"]
    return [
        (f"{table}.{key}", old[table][key], value)
        for table, keys in new.items()
        for key, value in keys.items()
        if key in old.get(table, {}) and old[table][key] != value
    ]
