"""Remove file paths from metadata: people publish adapter files, and a path can reveal a user's name.

A path is replaced by its last part, a home folder by `~`. This covers absolute POSIX and Windows paths (with a drive,
on a network share, or as a `file:` URL), paths that begin with `~`, and relative paths through a home folder. URLs,
dates and tags such as `o/` are kept. When in doubt, more is removed: words before a separator count as a folder name.
"""

import json
import re
from collections.abc import Mapping

from scumble.configs.errors import printable

IMAGE_KEYS = ("modelspec.thumbnail", "ssmd_cover_images")  # base64, in which slashes are not separators
MAX_PATH_LENGTH = 1024  # longer matches are not paths
HOMES = ("home", "users", "documents and settings")

_NAME = r"[^\s/\\:*?\"'<>|,;=(){}\[\]]{1,255}"
_SEPARATOR = r"[/\\]+"
_FOLDERS = rf"(?:{_NAME}(?: {_NAME}){{0,3}}{_SEPARATOR})"  # `My Pictures/`
_HOME = rf"(?i:{'|'.join(HOMES)}){_SEPARATOR}"
PATH = re.compile(
    r"(?<![\w./\\~<])(?:"  # not inside a word, a URL or a tag
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
)  # a value that consists of one path


def without_paths(metadata: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the metadata with every path cut to its last part, and the keys of the entries that changed."""
    clean = {_without_path(name): text if name in IMAGE_KEYS else _clean_value(text) for name, text in metadata.items()}
    return clean, [name for name, text in metadata.items() if clean.get(name) != text]


def describe_removed_paths(names: list[str]) -> list[str]:
    """Return one line that names the metadata entries with removed paths, or no line."""
    return [f"removed file paths from the metadata: {printable(', '.join(names))}"] if names else []


def last_part(path: str) -> str:
    """Return the last part of a POSIX or Windows path, or `~` for a home folder, whose name identifies a person."""
    parts = [part for part in re.split(_SEPARATOR, path) if part]
    is_home = len(parts) > 1 and parts[-2].lower() in HOMES
    return "~" if is_home or not parts or parts[-1].startswith("~") else parts[-1]


def _clean_value(text: str) -> str:
    """Clean one metadata value. JSON is parsed first, so that its keys and escaped backslashes are handled."""
    if text.startswith("data:"):
        return text
    if not text.startswith(("{", "[")):
        return _without_path(text)
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return _without_path(text)
    clean = _clean_json(parsed)
    return text if clean == parsed else json.dumps(clean, ensure_ascii=False)


def _clean_json(data: object) -> object:
    """Remove paths from parsed JSON. Keys that become equal are numbered, so that no entry is lost."""
    if isinstance(data, str):
        return _without_path(data)
    if isinstance(data, list):
        return [_clean_json(one) for one in data]
    if not isinstance(data, dict):
        return data
    clean: dict[str, object] = {}
    for name, value in data.items():
        short, number = _without_path(name), 1
        while short in clean:
            number += 1
            short = f"{_without_path(name)} ({number})"
        clean[short] = _clean_json(value)
    return clean


def _without_path(text: str) -> str:
    if len(text) <= MAX_PATH_LENGTH and ALONE.fullmatch(text):
        return last_part(text)
    return PATH.sub(lambda found: found[0] if len(found[0]) > MAX_PATH_LENGTH else last_part(found[0]), text)
