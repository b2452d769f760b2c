"""Adapter files on disk: only safetensors, read with suspicion, written whole or not at all, hashed."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from scumble.configs.errors import Refused

from .header import header_bytes, read_header
from .privacy import without_paths

MAX_METADATA_BYTES = 2**20  # above it, ComfyUI shows none; files of others may have more


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file whose header is sound."""
    if path.suffix.lower() in (".pt", ".pth", ".ckpt", ".bin", ".pkl"):
        raise Refused(f"{path}: a pickle can run any program hidden in it; only .safetensors is read")
    header = read_header(path)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in header.entries}, header.metadata


def write_adapter(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Path, force: bool = True
) -> list[str]:
    """Write a `.safetensors` through a temporary file that is synced and renamed; adds `sshs_model_hash`.

    No path of a disk gets into the file: they are cut, and the names of the metadata that held one are returned.
    Raises `Refused` where a tensor is not finite, the metadata is larger than UIs read, the file exists and `force` is
    false, or (73) where the place cannot be written.
    """
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise Refused(f"{path} was not written: {len(broken)} tensors are not finite, first {broken[0]}")
    clean, cut = without_paths(metadata)
    if sum(len(key.encode()) + len(value.encode()) for key, value in clean.items()) > MAX_METADATA_BYTES:
        raise Refused(f"{path} was not written: its metadata is larger than {MAX_METADATA_BYTES:,} bytes")
    if path.exists() and not force:
        raise Refused(f"{path} exists: choose another name, or --force to write over it")
    plain = memoryview(save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}))
    header_length = int.from_bytes(plain[:8], "little") + 8
    told, behind = json.loads(bytes(plain[8:header_length])), plain[header_length:]
    header = header_bytes(told, clean | {"sshs_model_hash": hashlib.sha256(behind).hexdigest()})
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(header)
            file.write(behind)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise Refused(f"{path}: cannot be written ({error.strerror or error})", 73) from None
    return cut
