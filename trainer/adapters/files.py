"""Read and write adapter files: safetensors only, with validated headers, atomic writes and a stored hash."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from scumble.configs.atomic import atomic_write
from scumble.configs.errors import Refused

from ..system.safetensors_header import Entry, header_bytes, read_header
from .privacy import without_paths

MAX_METADATA_BYTES = 2**20  # ComfyUI shows no larger metadata; files from other trainers may exceed it
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in file order


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read tensors and metadata of a safetensors file. Raises `Refused` if it is a pickle or its header is invalid."""
    if path.suffix.lower() in (".pt", ".pth", ".ckpt", ".bin", ".pkl"):
        raise Refused(f"{path}: pickle files can run arbitrary code; use a .safetensors file")
    header = read_header(path)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in header.entries}, header.metadata


def write_adapter(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Path, force: bool = True
) -> list[str]:
    """Write a `.safetensors` file atomically (temporary file, sync, rename) and add `sshs_model_hash`.

    File paths are removed from the metadata; returns the metadata keys that held one. The file is byte for byte what
    the safetensors library writes, but the tensors are not copied in memory. Raises `Refused` if a tensor is not finite
    or has an unsupported dtype, if the metadata is larger than UIs read, if the file exists and `force` is false, or
    (73) if the file cannot be written.
    """
    wrong = next((f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in DTYPES), "")
    if wrong:
        raise Refused(f"{path}: not written, {wrong}; use `scumble adapter convert --dtype fp16`")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise Refused(f"{path}: not written, {len(broken)} tensors have non-finite values, first {broken[0]}")
    clean, edited = without_paths(metadata)
    if sum(len(key.encode()) + len(value.encode()) for key, value in clean.items()) > MAX_METADATA_BYTES:
        raise Refused(f"{path}: not written, its metadata is larger than {MAX_METADATA_BYTES:,} bytes")
    if path.exists() and not force:
        raise Refused(f"{path}: file exists; choose another name, or use --force to overwrite it")
    order = list(DTYPES)  # by dtype, widest first, then by name, as in the safetensors library
    ordered = sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0]))
    entries, position, digest = {}, 0, hashlib.sha256()
    for name, tensor in ordered:
        data = bytes_of(tensor)
        entries[name] = Entry(DTYPES[tensor.dtype], tuple(tensor.shape), position, position + len(data)).to_json()
        position += len(data)
        digest.update(data)
    header = header_bytes(entries, clean | {"sshs_model_hash": digest.hexdigest()})
    with atomic_write(path, sync=True) as temporary, temporary.open("wb") as file:
        file.write(header)
        for _, tensor in ordered:
            file.write(bytes_of(tensor))
    return edited


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes in file order, as a view if the tensor is contiguous on the CPU."""
    return memoryview(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
