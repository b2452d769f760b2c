"""Merge adapters into a base permanently, so that no adapter needs to be loaded, or subtract them again.

Several adapters are applied in order, each to the result of the previous one.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scumble.configs.atomic import cannot_write, replace_folder, temporary_name
from scumble.configs.errors import Refused

from ..system.output_paths import check_disk_space
from ..system.safetensors_header import read_header
from .adapter import Adapter
from .compatibility import check_fit
from .factors import check_biases, check_finite
from .keys import ModulePath
from .privacy import describe_removed_paths, without_paths
from .rewrite import Change, rewrite
from .weights import FOLDERS, PICKLES, Weights, find_weights, layers_of, rows, weight_files

NAME_OR_PATH = "name_or_path"  # libraries store here where a model was loaded from


@dataclass(frozen=True)
class BakedAdapter:
    """An adapter and its strength. `name` appears in error messages and in the metadata of the result."""

    name: str
    adapter: Adapter
    strength: float = 1.0


def bake(base: Path, out: Path, adapters: Sequence[BakedAdapter], undo: bool = False, force: bool = False) -> list[str]:
    """Write the base with the adapters merged: a folder for a folder, a file for a file, with unchanged dtypes.

    `undo` subtracts the adapters; the result is exact up to rounding in the stored dtype. Returns lines to print about
    file paths removed from the metadata. Raises `Refused` before anything is written if an adapter has a layer that the
    base lacks, if shapes differ, if `out` exists and `force` is false, or (73) if the disk has too little free space.
    """
    weights = find_weights(base)
    check_bake(weights, adapters, undo)
    if out.exists() and not force:
        raise Refused(f"--out {out}: already exists; choose another name, or use --force to overwrite it")
    if base.resolve().is_relative_to(out.resolve()):
        raise Refused(f"--out {out}: is the base itself or contains it; choose another name")
    adapters = [BakedAdapter(item.name, item.adapter, -item.strength if undo else item.strength) for item in adapters]
    if base.is_dir():
        if out.suffix == ".safetensors":
            raise Refused(
                f"--out {out}: the base is a folder, so the result is one too; use a name without .safetensors"
            )
        return describe_removed_paths(bake_folder(base, out, adapters, comment_for(adapters)))
    if out.suffix != ".safetensors":
        raise Refused(f"--out {out}: the base is a single file; use a name that ends in .safetensors")
    check_disk_space(out, base.stat().st_size)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from None
    return describe_removed_paths(bake_file(base, out, None, adapters, comment_for(adapters)))


def bake_folder(base: Path, out: Path, adapters: Sequence[BakedAdapter], comment: str) -> list[str]:
    """Write a diffusers folder next to `out`, then rename it. Pickles are left out, since they stay unmerged."""
    if not (base / "model_index.json").is_file():
        raise Refused(f"{base}: not a diffusers folder, it has no model_index.json; use a folder that has one")
    temporary, edited = temporary_name(out), []
    if out.exists() and not (out / "model_index.json").is_file():
        raise Refused(f"--out {out}: is not a diffusers folder, so --force does not replace it; choose another name")
    check_disk_space(out, sum(file.stat().st_size for name in subfolders(base) for file in kept_files(base / name)))
    try:
        temporary.mkdir(parents=True)
        for name in subfolders(base):
            copy_subfolder(base / name, temporary / name, with_weights=name not in FOLDERS)
        shutil.copy2(base / "model_index.json", temporary)
        edited += remove_paths(temporary)
        for folder, component in FOLDERS.items():
            for file in weight_files(base / folder, all_variants=True):
                edited += bake_file(file, temporary / folder / file.name, component, adapters, comment)
        replace_folder(temporary, out)
    except OSError as error:
        raise cannot_write(out, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return list(dict.fromkeys(edited))


def subfolders(base: Path) -> list[str]:
    """Return the existing subfolders that model_index.json names."""
    index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    return [
        name
        for name, value in index.items()
        if isinstance(value, list) and name.isidentifier() and (base / name).is_dir()
    ]


def kept_files(folder: Path) -> list[Path]:
    """Return the files of a subfolder, except pickles."""
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix not in PICKLES]


def copy_subfolder(old: Path, new: Path, with_weights: bool) -> None:
    """Copy the files of a subfolder, except pickles and, unless `with_weights`, safetensors files."""
    new.mkdir()
    for file in kept_files(old):
        if with_weights or file.suffix != ".safetensors":
            target = new / file.relative_to(old)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)


def remove_paths(folder: Path) -> list[str]:
    """Remove file paths from `_name_or_path` in a folder's configs and return the names of the edited files."""
    edited = []
    for file in sorted(folder.rglob("*.json")):
        text = file.read_text(encoding="utf-8")
        if NAME_OR_PATH in text:
            config = json.loads(text, object_hook=without_model_path)
            if config != json.loads(text):
                file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
                edited.append(str(file.relative_to(folder)))
    return edited


def without_model_path(config: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object without file paths in `_name_or_path` (also a tokenizer's). Hub ids are kept."""
    names = {key: config[key] for key in config if key.endswith(NAME_OR_PATH) and isinstance(config[key], str)}
    return config | without_paths(names)[0]


def bake_file(old: Path, new: Path, component: str | None, adapters: Sequence[BakedAdapter], comment: str) -> list[str]:
    """Stream one weight file; `component` is None for a single-file base. Returns the edited metadata keys."""
    header = read_header(old)
    changes: dict[str, Change] = {}
    for name in header.entries:
        hits = [
            (third, layer)
            for layer, third in layers_of(name, component)
            if any(layer in item.adapter.modules for item in adapters)
        ]
        if hits:
            changes[name] = partial(with_adapters, hits=hits, adapters=adapters)
    clean, edited = without_paths(header.metadata)
    metadata = {name: value for name, value in clean.items() if not name.startswith("modelspec.hash")}
    metadata["baked"] = f"{metadata['baked']}; {comment}" if metadata.get("baked") else comment
    rewrite(old, new, changes, metadata)
    return edited


def with_adapters(
    tensor: torch.Tensor, hits: Sequence[tuple[int | None, ModulePath]], adapters: Sequence[BakedAdapter]
) -> torch.Tensor:
    """Apply all adapters in place to the layers stored in a base tensor (fp32)."""
    for third, layer in hits:
        weight = rows(tensor, third)
        for item in adapters:
            if layer in item.adapter.modules:
                weight.copy_(item.adapter.modules[layer].on(weight, item.strength))
    return tensor


def check_bake(weights: Weights, adapters: Sequence[BakedAdapter], undo: bool) -> None:
    """Raises `Refused` if an adapter does not fit the base, or if `undo` is impossible."""
    for item in adapters:
        check_finite(item.name, item.adapter)
        check_biases(item.name, item.adapter)
        found = next((layer for layer, module in item.adapter.modules.items() if module.is_dora), None)
        if undo and found:
            raise Refused(
                f"--undo {item.name}: {found} is DoRA, which replaces weight norms, and the merged base no longer "
                "has the original ones; use the original base"
            )
        check_fit(item.name, item.adapter, weights)


def comment_for(adapters: Sequence[BakedAdapter]) -> str:
    """Describe the merged adapters for the file's metadata."""
    return ", ".join(f"{item.name} x {item.strength:g}" for item in adapters)
