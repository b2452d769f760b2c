"""TOML <-> options. Layers are merged key by key: defaults < preset < file < flags.

Each layer is checked for itself before it is merged, so that a refusal names the place where the value stands.
"""

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import ValidationError
from tomlkit.items import Table

from .errors import Refused, did_you_mean
from .foreign_names import hint
from .options import Declared, Options, Section, declared

PRESETS = Path(__file__).parent / "presets"
BASES = Path(__file__).parent / "bases"

Layer = dict[str, dict[str, Any]]


def presets() -> dict[str, str]:
    """Name of each preset -> what it is for (the remark in the first line of its file)."""
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
        for path in sorted(PRESETS.glob("*.toml"))
    }


def resolve(
    file: Path | None = None, preset: str = "", flags: Mapping[str, Mapping[str, Any]] | None = None
) -> Options:
    """The options that a run really uses. A file may name its preset (`preset = "…"`); the flag goes before it.

    Raises `Refused` naming file or flag, key, value and what is allowed.
    """
    top = _read(file) if file else {}
    named = top.pop("preset", "")
    if not isinstance(named, str):
        raise Refused(f"{file}: preset = {_shown(named)}: must be text; `scumble presets` lists them")
    layers = [validated(top, _in_file(file))] if file else []
    if preset or named:
        layers.insert(0, _preset(preset or named, "--preset" if preset else f"{file}: preset ="))
    layers.append(validated({table: dict(keys) for table, keys in (flags or {}).items()}, as_flag))
    merged: Layer = {}
    for layer in layers:
        for table, keys in layer.items():
            merged.setdefault(table, {}).update(keys)
    return Options.model_validate(merged)


def dumps(options: Options) -> str:
    """TOML of every option with its help as a remark; `resolve` of a file with it gives the same options back."""
    document = tomlkit.document()
    for entry in declared():
        if entry.table not in document:
            document.add(entry.table, tomlkit.table())
        table = document[entry.table]
        assert isinstance(table, Table)
        value = getattr(getattr(options, entry.table), entry.key)
        item = tomlkit.item(list(value) if isinstance(value, tuple) else value)
        table.add(entry.key, item.comment(entry.help))
    return tomlkit.dumps(document)


def refusal(error: ValidationError, where: Callable[[str, str, Any], str]) -> Refused:
    """The first of pydantic's complaints as one line: where, what is allowed, the nearest name."""
    first = error.errors()[0]
    table, key, *_ = [str(part) for part in first["loc"]] + [""]
    place = where(table, key, first["input"])
    known: dict[str, list[Declared]] = {}
    for entry in declared():
        known.setdefault(entry.table, []).append(entry)
    if table not in known:
        homes = [entry.table for entry in declared() if entry.key == table]
        if not homes and (elsewhere := hint(table)):
            return Refused(f"{place}: {elsewhere}")
        cure = f" (it stands in [{homes[0]}])" if homes else did_you_mean(table, list(known))
        return Refused(f"{place}: no such table{cure}; there are {', '.join(known)}")
    if not key:
        return Refused(f"{place}: [{table}] is a table of options, not a value")
    for entry in known[table]:
        if entry.key == key:
            return Refused(f"{place}: must be {entry.allowed}")
    homes = [entry.table for entry in declared() if entry.key == key]
    if not homes and (elsewhere := hint(key)):
        return Refused(f"{place}: {elsewhere}")
    cure = f" (it stands in [{homes[0]}])" if homes else did_you_mean(key, [entry.key for entry in declared()])
    return Refused(f"{place}: no such option in [{table}]{cure}; `scumble options` lists them all")


def as_flag(table: str, key: str, value: Any) -> str:
    """Where a value stands that came from the command line."""
    return f"--{(key or table).replace('_', '-')} {value}"


def _preset(name: str, source: str) -> Layer:
    path = PRESETS / f"{name}.toml"
    if name not in presets():
        raise Refused(
            f"{source} {name}: no such preset{did_you_mean(name, list(presets()))}; there are {', '.join(presets())}"
        )
    return validated(_read(path), _in_file(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise Refused(f"{path}: no such file") from None
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise Refused(f"{path} is not UTF-8: save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"{path} is not TOML: {error}") from None


def validated(layer: dict[str, Any], where: Callable[[str, str, Any], str]) -> Layer:
    """The same layer with its values in their types; a TOML number is not taken for a text, nor the other way."""
    for keys in layer.values():
        if isinstance(keys, dict):
            keys.update({key: tuple(value) for key, value in keys.items() if isinstance(value, list)})
    try:
        found = Options.model_validate(layer, strict=True)
    except ValidationError as error:
        raise refusal(error, where) from None
    return {table: getattr(found, table).model_dump(exclude_unset=True) for table in found.model_fields_set}


def _in_file(path: Path | None) -> Callable[[str, str, Any], str]:
    return lambda table, key, value: f"{path}: {'.'.join(filter(None, (table, key)))} = {_shown(value)}"


def _shown(value: Any) -> str:
    """A value as TOML writes it, cut where it is long."""
    if isinstance(value, dict | Section):
        return "{…}"
    text = tomlkit.item(list(value) if isinstance(value, tuple) else value).as_string()
    return text if len(text) <= 60 else text[:57] + "…"
