"""Reads and writes options as TOML. Layers are merged key by key: defaults < preset < file < flags.

Each layer is validated before it is merged, so that an error names the file or flag that has the invalid value.
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
    """Return each preset's name -> its purpose (the comment in the first line of its file)."""
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
        for path in sorted(PRESETS.glob("*.toml"))
    }


def resolve(
    file: Path | None = None, preset: str = "", flags: Mapping[str, Mapping[str, Any]] | None = None
) -> Options:
    """Merge all layers into the options of a run. `preset` overrides the preset that the file names (`preset = "…"`).

    Raises `Refused` with the file or flag, the key, the value and the allowed values.
    """
    content = _read(file) if file else {}
    file_preset = content.pop("preset", "")
    if not isinstance(file_preset, str):
        raise Refused(f"{file}: preset = {_toml_value(file_preset)}: must be text; `scumble presets` lists the presets")
    layers = [validated(content, _in_file(file))] if file else []
    if preset or file_preset:
        layers.insert(0, _preset(preset or file_preset, "--preset" if preset else f"{file}: preset ="))
    layers.append(validated({table: dict(keys) for table, keys in (flags or {}).items()}, as_flag))
    merged: Layer = {}
    for layer in layers:
        for table, keys in layer.items():
            merged.setdefault(table, {}).update(keys)
    return Options.model_validate(merged)


def dumps(options: Options) -> str:
    """Write every option as TOML, with its help as a comment; `resolve` reads the same options back."""
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
    """Turn the first error of pydantic into one line: the location, the allowed values, the closest known name."""
    first = error.errors()[0]
    table, key, *_ = [str(part) for part in first["loc"]] + [""]
    location = where(table, key, first["input"])
    known: dict[str, list[Declared]] = {}
    for entry in declared():
        known.setdefault(entry.table, []).append(entry)
    if table not in known:
        tables = [entry.table for entry in declared() if entry.key == table]
        if not tables and (advice := hint(table)):
            return Refused(f"{location}: {advice}")
        fix = f" (move it to [{tables[0]}])" if tables else did_you_mean(table, list(known))
        return Refused(f"{location}: no such table{fix}; the tables are {', '.join(known)}")
    if not key:
        return Refused(f"{location}: [{table}] is a table of options, not a value")
    for entry in known[table]:
        if entry.key == key:
            return Refused(f"{location}: must be {entry.allowed}")
    tables = [entry.table for entry in declared() if entry.key == key]
    if not tables and (advice := hint(key)):
        return Refused(f"{location}: {advice}")
    fix = f" (move it to [{tables[0]}])" if tables else did_you_mean(key, [entry.key for entry in declared()])
    return Refused(f"{location}: no such option in [{table}]{fix}; `scumble options` lists all options")


def as_flag(table: str, key: str, value: Any) -> str:
    """The location of a value that came from the command line."""
    return f"--{(key or table).replace('_', '-')} {value}"


def _preset(name: str, source: str) -> Layer:
    path = PRESETS / f"{name}.toml"
    known = presets()
    if name not in known:
        raise Refused(
            f"{source} {name}: no such preset{did_you_mean(name, list(known))}; the presets are {', '.join(known)}"
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
        raise Refused(f"{path}: is not UTF-8; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"{path}: is not TOML ({error})") from None


def validated(layer: dict[str, Any], where: Callable[[str, str, Any], str]) -> Layer:
    """Validate a layer without converting types (a number is not accepted as text). Raises `Refused`."""
    for keys in layer.values():
        if isinstance(keys, dict):
            keys.update({key: tuple(value) for key, value in keys.items() if isinstance(value, list)})
    try:
        options = Options.model_validate(layer, strict=True)
    except ValidationError as error:
        raise refusal(error, where) from None
    return {table: getattr(options, table).model_dump(exclude_unset=True) for table in options.model_fields_set}


def _in_file(path: Path | None) -> Callable[[str, str, Any], str]:
    return lambda table, key, value: f"{path}: {'.'.join(filter(None, (table, key)))} = {_toml_value(value)}"


def _toml_value(value: Any) -> str:
    """A value in TOML notation, truncated to 60 characters."""
    if isinstance(value, dict | Section):
        return "{…}"
    text = tomlkit.item(list(value) if isinstance(value, tuple) else value).as_string()
    return text if len(text) <= 60 else text[:57] + "…"
