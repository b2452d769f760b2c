"""Metadata without the paths of anybody's disk: people publish these files, and a path tells a name.

A path becomes its last part, a home folder `~`. Found are absolute paths of POSIX and Windows (with a drive, on a
share, as a `file:` link), those that begin with `~`, and relative ones through a home; web addresses, dates and tags
such as `o/` are left alone. In doubt too much is cut: a space belongs to a folder's name where a separator follows.
"""

import json
import re
from collections.abc import Mapping

from scumble.configs.errors import printable

PICTURES = ("modelspec.thumbnail", "ssmd_cover_images")  # base64, in which slashes mean nothing
LONGEST = 1024  # what is longer than paths are, is none
HOMES = ("home", "users", "documents and settings")

_NAME = r"[^\s/\\:*?\"'<>|,;=(){}\[\]]{1,255}"
_SEPARATOR = r"[/\\]+"
_FOLDERS = rf"(?:{_NAME}(?: {_NAME}){{0,3}}{_SEPARATOR})"  # `My Pictures/`
_HOME = rf"(?i:{'|'.join(HOMES)}){_SEPARATOR}"
PATH = re.compile(
    r"(?<![\w./\\~<])(?:"  # not within a word, an address or a tag
    rf"(?:file:/+)?[A-Za-z]:{_SEPARATOR}{_FOLDERS}*(?:{_NAME})?"
    rf"|\\\\+{_FOLDERS}+(?:{_NAME})?"
    rf"|(?:file:/*)?/(?!/){_FOLDERS}+{_NAME}(?:{_SEPARATOR})?"
    rf"|~(?:[A-Za-z_][\w.-]*)?{_SEPARATOR}{_FOLDERS}*(?:{_NAME})?"
    rf"|(?:\.\.?{_SEPARATOR})+{_HOME}{_FOLDERS}*(?:{_NAME})?"
    rf"|{_HOME}{_FOLDERS}+(?:{_NAME})?"
    r")"
)
ALONE = re.compile(
    r"(?:[A-Za-z]:[/\\]|\\\\|/(?!/)[^/]+/|~(?:[A-Za-z_]\w*)?[/\\])[^\n,;\"|<>?*]+"
)  # a text that is a path as a whole


def without_paths(metadata: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The metadata with every path cut to its last part, and the names of the entries that had one."""
    clean = {_cut(name): text if name in PICTURES else _value(text) for name, text in metadata.items()}
    return clean, [name for name, text in metadata.items() if clean.get(name) != text]


def words_for_cut(names: list[str]) -> list[str]:
    """What a person is told of the entries that had a path: a line, or none."""
    return [f"paths of a disk were cut out of its metadata: {printable(', '.join(names))}"] if names else []


def last_part(path: str) -> str:
    """The last part of a path of either kind; `~` for a home folder itself, whose name is a person's."""
    parts = [part for part in re.split(_SEPARATOR, path) if part]
    is_home = len(parts) > 1 and parts[-2].lower() in HOMES
    return "~" if is_home or not parts or parts[-1].startswith("~") else parts[-1]


def _value(text: str) -> str:
    """One entry; JSON is taken apart, so that names and doubled backslashes in it are seen."""
    if text.startswith("data:"):
        return text
    if not text.startswith(("{", "[")):
        return _cut(text)
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return _cut(text)
    clean = _inside(told)
    return text if clean == told else json.dumps(clean, ensure_ascii=False)


def _inside(told: object) -> object:
    """What JSON holds, without paths; names that become alike are numbered, so that no entry is lost."""
    if isinstance(told, str):
        return _cut(told)
    if isinstance(told, list):
        return [_inside(one) for one in told]
    if not isinstance(told, dict):
        return told
    clean: dict[str, object] = {}
    for name, value in told.items():
        short, number = _cut(name), 1
        while short in clean:
            number += 1
            short = f"{_cut(name)} ({number})"
        clean[short] = _inside(value)
    return clean


def _cut(text: str) -> str:
    if len(text) <= LONGEST and ALONE.fullmatch(text):
        return last_part(text)
    return PATH.sub(lambda found: found[0] if len(found[0]) > LONGEST else last_part(found[0]), text)
