"""Adapter files on disk: written whole or not at all, read back, hashed."""

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from scumble.configs.errors import Refused


def write_adapter(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write a `.safetensors` through a temporary file that is synced and renamed; adds `sshs_model_hash`.

    Raises `Refused` where a tensor is not finite, or (73) where the place cannot be written.
    """
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise Refused(f"{path} was not written: {len(broken)} tensors are not finite, first {broken[0]}")
    contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    plain = save(contiguous)
    header_length = int.from_bytes(plain[:8], "little") + 8
    digest = hashlib.sha256(plain[header_length:]).hexdigest()
    data = save(contiguous, dict(metadata) | {"sshs_model_hash": digest})
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise Refused(f"{path}: cannot be written ({error.strerror or error})", 73) from None


def read_adapter(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a `.safetensors` file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
