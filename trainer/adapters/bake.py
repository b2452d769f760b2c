"""Adapters added into a base for good: the same pictures with no adapter to load; or taken out again.

Several adapters go one by one, each on what the one before it made.
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

from ..system.output_paths import check_room
from ..system.safetensors_header import read_header
from .adapter import Adapter
from .compatibility import check_fit
from .factors import check_biases, check_finite
from .keys import ModulePath
from .privacy import without_paths, words_for_cut
from .rewrite import Change, rewrite
from .weights import FOLDERS, PICKLES, Weights, find_weights, places_of, rows, weight_files

NAME_OR_PATH = "name_or_path"  # libraries write there where a part was loaded from


@dataclass(frozen=True)
class BakedAdapter:
    """One adapter and how much of it; `name` is said in refusals and in the result's metadata."""

    name: str
    adapter: Adapter
    strength: float = 1.0


def bake(base: Path, out: Path, doses: Sequence[BakedAdapter], undo: bool = False, force: bool = False) -> list[str]:
    """Write the base with the adapters in it: a folder from a folder, a file from a file, types as they were.

    `undo` takes them out, exactly but for the rounding of the type. Raises `Refused` before anything is written where
    an adapter has a layer that the base has not, where shapes differ, where `out` exists and `force` is false, or (73)
    where the disk has too little room.
    Returns what to say of paths that were cut out of its metadata.
    """
    weights = find_weights(base)
    check_bake(weights, doses, undo)
    if out.exists() and not force:
        raise Refused(f"{out} exists: choose another name, or --force to write over it")
    if base.resolve().is_relative_to(out.resolve()):
        raise Refused(f"{out} is the base itself, or holds it: choose another name")
    doses = [BakedAdapter(dose.name, dose.adapter, -dose.strength if undo else dose.strength) for dose in doses]
    if base.is_dir():
        if out.suffix == ".safetensors":
            raise Refused(
                f"--out {out}: the base is a folder, and so is what is written; give a name without .safetensors"
            )
        return words_for_cut(bake_folder(base, out, doses, note(doses)))
    if out.suffix != ".safetensors":
        raise Refused(f"{out}: the base is one file, so give a name that ends in .safetensors")
    check_room(out, base.stat().st_size)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from None
    return words_for_cut(bake_file(base, out, None, doses, note(doses)))


def bake_folder(base: Path, out: Path, doses: Sequence[BakedAdapter], comment: str) -> list[str]:
    """A diffusers folder, built beside `out` and renamed; pickles of the base are left out, they would be unbaked."""
    if not (base / "model_index.json").is_file():
        raise Refused(f"{base}: no model_index.json in it, so it is not a diffusers folder")
    temporary, cut = temporary_name(out), []
    if out.exists() and not (out / "model_index.json").is_file():
        raise Refused(f"{out}: is there and is no diffusers folder, so it is not replaced; choose another name")
    check_room(out, sum(file.stat().st_size for name in part_folders(base) for file in kept_files(base / name)))
    try:
        temporary.mkdir(parents=True)
        for name in part_folders(base):
            copy_part(base / name, temporary / name, with_weights=name not in FOLDERS)
        shutil.copy2(base / "model_index.json", temporary)
        cut += cut_names(temporary)
        for part, component in FOLDERS.items():
            for file in weight_files(base / part, all_variants=True):
                cut += bake_file(file, temporary / part / file.name, component, doses, comment)
        replace_folder(temporary, out)
    except OSError as error:
        raise cannot_write(out, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return list(dict.fromkeys(cut))


def part_folders(base: Path) -> list[str]:
    """Folders that model_index.json names, where they are there."""
    index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    return [
        name
        for name, value in index.items()
        if isinstance(value, list) and name.isidentifier() and (base / name).is_dir()
    ]


def kept_files(part: Path) -> list[Path]:
    """The files of one part but for pickles."""
    return [file for file in sorted(part.rglob("*")) if file.is_file() and file.suffix not in PICKLES]


def copy_part(old: Path, new: Path, with_weights: bool) -> None:
    """The files of one part but for pickles, and for weights that are written anew."""
    new.mkdir()
    for file in kept_files(old):
        if with_weights or file.suffix != ".safetensors":
            target = new / file.relative_to(old)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)


def cut_names(folder: Path) -> list[str]:
    """Cut paths of a disk out of the `_name_or_path` of a folder's configs; the names of the files that had one."""
    cut = []
    for file in sorted(folder.rglob("*.json")):
        text = file.read_text(encoding="utf-8")
        if NAME_OR_PATH in text:
            told = json.loads(text, object_hook=without_own_path)
            if told != json.loads(text):
                file.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
                cut.append(str(file.relative_to(folder)))
    return cut


def without_own_path(told: dict[str, Any]) -> dict[str, Any]:
    """A table of JSON whose `_name_or_path`, or that of a tokenizer, is no path of a disk; a hub id stays."""
    names = {key: told[key] for key in told if key.endswith(NAME_OR_PATH) and isinstance(told[key], str)}
    return told | without_paths(names)[0]


def bake_file(old: Path, new: Path, component: str | None, doses: Sequence[BakedAdapter], comment: str) -> list[str]:
    """One file of weights, streamed; `component` is None where it holds all. Returns metadata that was cut."""
    header = read_header(old)
    changes: dict[str, Change] = {}
    for name in header.entries:
        hits = [
            (third, place)
            for place, third in places_of(name, component)
            if any(place in dose.adapter.modules for dose in doses)
        ]
        if hits:
            changes[name] = partial(with_adapters, hits=hits, doses=doses)
    kept, cut = without_paths(header.metadata)
    told = {name: value for name, value in kept.items() if not name.startswith("modelspec.hash")}
    told["baked"] = f"{told['baked']}; {comment}" if told.get("baked") else comment
    rewrite(old, new, changes, told)
    return cut


def with_adapters(
    tensor: torch.Tensor, hits: Sequence[tuple[int | None, ModulePath]], doses: Sequence[BakedAdapter]
) -> torch.Tensor:
    """A base's tensor (fp32), in place, with all that is added to the layers which lie in it."""
    for third, place in hits:
        part = rows(tensor, third)
        for dose in doses:
            if place in dose.adapter.modules:
                part.copy_(dose.adapter.modules[place].on(part, dose.strength))
    return tensor


def check_bake(weights: Weights, doses: Sequence[BakedAdapter], undo: bool) -> None:
    """Raises `Refused` where an adapter does not fit the base, or where what is to be undone cannot be."""
    for dose in doses:
        check_finite(dose.name, dose.adapter)
        check_biases(dose.name, dose.adapter)
        found = next((place for place, module in dose.adapter.modules.items() if module.is_dora), None)
        if undo and found:
            raise Refused(
                f"--undo {dose.name}: {found} is DoRA, which sets lengths anew, and "
                "those before are not in the baked base; keep the base itself"
            )
        check_fit(dose.name, dose.adapter, weights)


def note(doses: Sequence[BakedAdapter]) -> str:
    """What was added, for the file's metadata."""
    return ", ".join(f"{dose.name} x {dose.strength:g}" for dose in doses)
