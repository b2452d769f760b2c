"""What is costly to compute of a picture, kept on the disk: entries of tensors under keys that are content digests.

A key covers everything that changes the entry, so a stale one is impossible. Entries are written whole under another
name and renamed, so that several processes may share a cache; one that is damaged is as good as none.
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
    """Where programs keep what can be computed again (XDG base directories; on Windows the local application data)."""
    home = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", "")
    return (Path(home) if home else Path.home() / ".cache") / "scumble"


def cache_in(folder: str) -> "Cache":
    """The cache that an option names: a folder, or auto."""
    return Cache(default_folder() if folder == "auto" else Path(folder))


def key_of(*parts: object) -> str:
    """A key from everything that decides an entry; the parts must have a repr that tells them apart."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=20).hexdigest()


class Cache:
    """Entries of named tensors in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """The entry, or None where there is none or it is not whole."""
        try:
            with safe_open(self._path(key), "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
                digest = (file.metadata() or {}).get("digest")
        except (OSError, SafetensorError):
            return None
        return found if digest == digest_of_tensors(found) else None

    def put(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write an entry whole. Raises `Refused` (73) where the place cannot be written."""
        path = self._path(key)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_write(path) as temporary:
            temporary.write_bytes(save(plain, {"digest": digest_of_tensors(plain)}))

    def sizes(self) -> list[int]:
        """Bytes of each entry."""
        return [size for _, size, _ in self._entries()]

    def clear(self, older_than_days: float = 0) -> tuple[int, int]:
        """Delete the entries that were written so many days ago; their number and bytes."""
        count = freed = 0
        for path, size, written in self._entries():
            if not older_than_days or time.time() - written >= older_than_days * DAY_S:  # clocks may have been wrong
                path.unlink(missing_ok=True)
                count, freed = count + 1, freed + size
        return count, freed

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _entries(self) -> Iterator[tuple[Path, int, float]]:
        for path in sorted(self.folder.glob("??/*")):
            with suppress(OSError):  # another process may clear it too
                status = path.stat()
                yield path, status.st_size, status.st_mtime


def digest_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names, types, shapes and every bit."""
    digest = hashlib.blake2b(digest_size=20)
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
