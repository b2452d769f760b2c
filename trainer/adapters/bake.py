"""Adapters added into a base for good: the same pictures with no adapter to load; or taken out again.

W' = W + strength · dW. DoRA (Liu et al. 2024) sets the length of each column (kohya's files, [1, in]) or row (PEFT's,
[out]) of V = W + dW: W' = W + strength · (m · V / ‖V‖ - W), as UIs and PEFT do it. Several adapters go one by one.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from scumble.configs.errors import Refused

from .adapter import Adapter, Module
from .factors import delta_shape, refuse_dora
from .files import read_header
from .keys import Place
from .stream import Change, rewrite
from .weights import FOLDERS, PICKLES, Spot, Weights, find_weights, places_of, rows, weight_files


@dataclass(frozen=True)
class Dose:
    """One adapter and how much of it; `name` is said in refusals and in the result's metadata."""

    name: str
    adapter: Adapter
    strength: float = 1.0


def bake(base: Path, out: Path, doses: Sequence[Dose], undo: bool = False, force: bool = False) -> None:
    """Write the base with the adapters in it: a folder from a folder, a file from a file, types as they were.

    `undo` takes them out, exactly but for the rounding of the type. Raises `Refused` before anything is written where
    an adapter has a layer that the base has not, where shapes differ, or where `out` exists and `force` is false.
    """
    weights = find_weights(base)
    check(weights, doses, undo)
    if out.exists() and not force:
        raise Refused(f"{out} exists: choose another name, or --force to write over it")
    if out.resolve() == base.resolve():
        raise Refused(f"{out} is the base itself: choose another name")
    doses = [Dose(dose.name, dose.adapter, -dose.strength if undo else dose.strength) for dose in doses]
    if base.is_dir():
        bake_folder(base, out, doses, note(doses))
        return
    if out.suffix != ".safetensors":
        raise Refused(f"{out}: the base is one file, so give a name that ends in .safetensors")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{out}: cannot be written ({error.strerror or error})", 73) from None
    bake_file(base, out, None, doses, note(doses))


def bake_folder(base: Path, out: Path, doses: Sequence[Dose], comment: str) -> None:
    """A diffusers folder, built beside `out` and renamed; pickles of the base are left out, they would be unbaked."""
    if not (base / "model_index.json").is_file():
        raise Refused(f"{base}: no model_index.json in it, so it is not a diffusers folder")
    temporary = out.with_name(out.name + ".part")
    if out.exists() and not (out / "model_index.json").is_file():
        raise Refused(f"{out}: is there and is no diffusers folder, so it is not replaced; choose another name")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name in parts_of(base):
            copy_part(base / name, temporary / name, with_weights=name not in FOLDERS)
        shutil.copy2(base / "model_index.json", temporary)
        for part, component in FOLDERS.items():
            for file in weight_files(base / part, all_variants=True):
                bake_file(file, temporary / part / file.name, component, doses, comment)
        if out.exists():
            shutil.rmtree(out)
        temporary.replace(out)
    except OSError as error:
        raise Refused(f"{out}: cannot be written ({error.strerror or error})", 73) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def parts_of(base: Path) -> list[str]:
    """Folders that model_index.json names, where they are there."""
    index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    return [
        name
        for name, value in index.items()
        if isinstance(value, list) and name.isidentifier() and (base / name).is_dir()
    ]


def copy_part(old: Path, new: Path, with_weights: bool) -> None:
    """The files of one part but for pickles, and for weights that are written anew."""
    left_out = PICKLES if with_weights else (*PICKLES, ".safetensors")
    shutil.copytree(old, new, ignore=shutil.ignore_patterns(*(f"*{suffix}" for suffix in left_out)))


def bake_file(old: Path, new: Path, component: str | None, doses: Sequence[Dose], comment: str) -> None:
    """One file of weights, streamed; `component` is None where it holds all."""
    header = read_header(old)
    changes: dict[str, Change] = {}
    for name in header.entries:
        hits = [
            (third, place)
            for place, third in places_of(name, component)
            if any(place in dose.adapter.modules for dose in doses)
        ]
        if hits:
            changes[name] = partial(with_doses, hits=hits, doses=doses)
    told = {name: value for name, value in header.metadata.items() if not name.startswith("modelspec.hash")}
    told["baked"] = f"{told['baked']}; {comment}" if told.get("baked") else comment
    rewrite(old, new, changes, told)


def with_doses(tensor: torch.Tensor, hits: Sequence[tuple[int | None, Place]], doses: Sequence[Dose]) -> torch.Tensor:
    """A base's tensor (fp32) with all that is added to the layers which lie in it."""
    result = tensor.clone()
    for third, place in hits:
        part = rows(result, third)
        for dose in doses:
            if place in dose.adapter.modules:
                part.copy_(baked(part, dose.adapter.modules[place], dose.strength, dose.adapter.dialect))
    return result


def baked(weight: torch.Tensor, module: Module, strength: float, dialect: str) -> torch.Tensor:
    """W' of one layer (out, in) or (out, in, h, w) in fp32."""
    delta = module.delta().reshape(weight.shape)
    if "dora_scale" not in module.tensors:
        return weight + strength * delta
    axis = 0 if dialect == "peft" else 1
    return weight + strength * (dora(weight + delta, module.tensors["dora_scale"].float(), axis) - weight)


def dora(direction: torch.Tensor, magnitude: torch.Tensor, axis: int) -> torch.Tensor:
    """m · V / ‖V‖ for V (out, in, …), with one m and one norm for each place of `axis` (0 outputs, 1 inputs)."""
    others = [other for other in range(direction.dim()) if other != axis]
    norm = torch.linalg.vector_norm(direction, dim=others, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return direction * (magnitude.reshape(norm.shape) / norm)


def check(weights: Weights, doses: Sequence[Dose], undo: bool) -> None:
    """Raises `Refused` where a layer of an adapter is not in the base or has another shape, or DoRA is to be undone."""
    shapes: dict[Path, Mapping[str, tuple[int, ...]]] = {}
    for dose in doses:
        missing = [place for place in dose.adapter.modules if place not in weights.spots]
        if missing:
            first = f"{missing[0].component} {missing[0].path}"
            raise Refused(
                f"{dose.name}: {len(missing)} of {len(dose.adapter.modules)} layers are not in {weights.path}, "
                f"first {first}; it is for another base"
            )
        if undo:
            refuse_dora(f"--undo {dose.name}", dose.adapter)
        for place in dose.adapter.modules:
            spot = weights.spots[place]
            if spot.file not in shapes:
                shapes[spot.file] = {name: entry.shape for name, entry in read_header(spot.file).entries.items()}
            check_shape(dose, place, spot_shape(shapes[spot.file], spot))


def spot_shape(shapes: Mapping[str, tuple[int, ...]], spot: Spot) -> tuple[int, ...]:
    """Shape of the layer's own weight."""
    out, *rest = shapes[spot.name]
    return (out if spot.third is None else out // 3, *rest)


def check_shape(dose: Dose, place: Place, shape: tuple[int, ...]) -> None:
    """Raises `Refused` where a module does not fit a weight of this shape."""
    module = dose.adapter.modules[place]
    out, inputs = delta_shape(module)
    wanted = torch.Size(shape[1:]).numel()
    where = f"{dose.name}: {place.component} {place.path}"
    if (out, inputs) != (shape[0], wanted):
        raise Refused(f"{where} is {out} x {inputs}, the base's is {shape[0]} x {wanted}; it is for another base")
    magnitude = module.tensors.get("dora_scale")
    if magnitude is None:
        return
    if dose.adapter.dialect == "kohya" and (magnitude.dim() < 2 or tuple(magnitude.shape[:2]) != (1, shape[1])):
        raise Refused(
            f"{where} has DoRA magnitudes {tuple(magnitude.shape)}; only those of inputs mean one thing in UIs"
        )
    if dose.adapter.dialect == "peft" and magnitude.numel() != shape[0]:
        raise Refused(f"{where} has {magnitude.numel()} DoRA magnitudes for {shape[0]} outputs")


def note(doses: Sequence[Dose]) -> str:
    """What was added, for the file's metadata."""
    return ", ".join(f"{dose.name} x {dose.strength:g}" for dose in doses)
