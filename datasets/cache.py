"""A disk cache of tensors that are slow to compute from images. Keys are content hashes.

A key covers everything that changes its entry, so entries are never stale. Entries are written to a temporary file and
renamed, so several processes can share a cache. A damaged entry counts as missing.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from scumble.configs.atomic import atomic_write

DAY_S = 86400


def default_folder() -> Path:
    """Return the user's cache folder (XDG Base Directory Specification; on Windows, local application data)."""
    home = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", "")
    return (Path(home) if home else Path.home() / ".cache") / "scumble"


def cache_in(folder: str) -> "Cache":
    """Return the cache in the folder that an option names, or in the default folder for "auto"."""
    return Cache(default_folder() if folder == "auto" else Path(folder))


def key_of(*parts: object) -> str:
    """Return the key for everything that determines an entry. Different parts must have a different repr."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=20).hexdigest()


class Cache:
    """A cache in `folder`. Each entry is a set of named tensors."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """Return the entry, or None if it is missing or damaged."""
        try:
            with safe_open(self._path(key), "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
                digest = (file.metadata() or {}).get("digest")
        except (OSError, SafetensorError):
            return None
        return found if digest == digest_of_tensors(found) else None

    def put(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write an entry atomically. Raises `Refused` (73) if the cache folder is not writable."""
        path = self._path(key)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_write(path) as temporary:
            temporary.write_bytes(save(plain, {"digest": digest_of_tensors(plain)}))

    def sizes(self) -> list[int]:
        """Return the size of each entry in bytes."""
        return [size for _, size, _ in self._entries()]

    def clear(self, older_than_days: float = 0) -> tuple[int, int]:
        """Delete entries of at least this age, or all for 0. Return the number of entries and bytes deleted."""
        count = freed = 0
        for path, size, written in self._entries():
            # 0 deletes everything, even entries that a wrong clock has dated in the future
            if not older_than_days or time.time() - written >= older_than_days * DAY_S:
                path.unlink(missing_ok=True)
                count, freed = count + 1, freed + size
        return count, freed

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _entries(self) -> Iterator[tuple[Path, int, float]]:
        for path in sorted(self.folder.glob("??/*")):
            with suppress(OSError):  # another process may be clearing the cache
                status = path.stat()
                yield path, status.st_size, status.st_mtime


def digest_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a hash of the names, dtypes, shapes and contents."""
    digest = hashlib.blake2b(digest_size=20)
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
