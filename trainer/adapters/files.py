"""Adapter files on disk: only safetensors, read with suspicion, written whole or not at all, hashed."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from scumble.configs.atomic import atomic_write
from scumble.configs.errors import Refused

from ..system.safetensors_header import Entry, header_bytes, read_header
from .privacy import without_paths

MAX_METADATA_BYTES = 2**20  # above it, ComfyUI shows none; files of others may have more
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # as laid in a file


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

    No path of a disk gets into the file: they are cut, and the names of the metadata that held one are returned. It is
    what safetensors writes, byte for byte, but no second copy of the tensors is made in memory. Raises `Refused` where
    a tensor is not finite or of a type that no adapter has, the metadata is larger than UIs read, the file exists and
    `force` is false, or (73) where the place cannot be written.
    """
    foreign = next((f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in DTYPES), "")
    if foreign:
        raise Refused(f"{path} was not written: {foreign}; `scumble adapter convert --dtype fp16` mends it")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise Refused(f"{path} was not written: {len(broken)} tensors are not finite, first {broken[0]}")
    clean, cut = without_paths(metadata)
    if sum(len(key.encode()) + len(value.encode()) for key, value in clean.items()) > MAX_METADATA_BYTES:
        raise Refused(f"{path} was not written: its metadata is larger than {MAX_METADATA_BYTES:,} bytes")
    if path.exists() and not force:
        raise Refused(f"{path} exists: choose another name, or --force to write over it")
    order = list(DTYPES)  # wide types first, then by name, as safetensors lays them
    laid = sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0]))
    entries, position, digest = {}, 0, hashlib.sha256()
    for name, tensor in laid:
        data = bytes_of(tensor)
        entries[name] = Entry(DTYPES[tensor.dtype], tuple(tensor.shape), position, position + len(data)).told()
        position += len(data)
        digest.update(data)
    header = header_bytes(entries, clean | {"sshs_model_hash": digest.hexdigest()})
    with atomic_write(path, sync=True) as temporary, temporary.open("wb") as file:
        file.write(header)
        for _, tensor in laid:
            file.write(bytes_of(tensor))
    return cut


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The numbers of a tensor as they lie in a file; a view where it lies so in memory."""
    return memoryview(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
