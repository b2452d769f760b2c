"""Rewrite a checkpoint tensor by tensor. The file layout does not change, so only one tensor at a time is in memory."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from scumble.configs.atomic import atomic_write
from scumble.configs.errors import Refused
from scumble.configs.progress import tracked

from ..system.safetensors_header import Entry, header_bytes, read_header

CHUNK_BYTES = 16 * 2**20
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
Change = Callable[[torch.Tensor], torch.Tensor]  # may modify its input in place


def rewrite(source: Path, target: Path, changes: Mapping[str, Change], metadata: Mapping[str, str]) -> None:
    """Write the tensors of `source` to `target`, applying `changes` (by tensor name) in fp32. Dtypes and shapes stay.

    The file is written atomically (temporary file, sync, rename): the header, then each tensor's bytes in order. Raises
    `Refused` if a changed tensor is not finite in its stored dtype, or (73) if the file cannot be written.
    """
    header = read_header(source)
    with atomic_write(target, sync=True) as temporary, source.open("rb") as old, temporary.open("wb") as new:
        new.write(header_bytes({name: entry.to_json() for name, entry in header.entries.items()}, metadata))
        in_order = sorted(header.entries.items(), key=lambda item: (item[1].start, item[1].end))
        for name, entry in tracked(in_order, f"writing {target.name}", len(in_order)):
            old.seek(header.size + entry.start)
            if name in changes:
                new.write(changed(old, entry, changes[name], f"{target.name}: {name}"))
            else:
                copy_bytes(old, new, entry.end - entry.start)


def changed(file: BinaryIO, entry: Entry, change: Change, where: str) -> bytes:
    """Read the tensor at the file position, apply `change` in fp32 and return the bytes in the stored dtype."""
    if entry.dtype not in DTYPES:
        raise Refused(f"{where} is stored as {entry.dtype}, which cannot be changed; use a base in F16, BF16 or F32")
    raw = bytearray(file.read(entry.end - entry.start))
    tensor = torch.frombuffer(raw, dtype=DTYPES[entry.dtype]).reshape(entry.shape)
    result = change(tensor.float()).to(tensor.dtype)
    checked = result.float() if result.dtype.itemsize == 1 else result  # isfinite does not support fp8
    if not torch.isfinite(checked).all():
        raise Refused(f"{where} would overflow {entry.dtype}; use a smaller strength or a base in F32")
    return result.contiguous().view(torch.uint8).numpy().tobytes()


def copy_bytes(old: BinaryIO, new: BinaryIO, count: int) -> None:
    while count:
        data = old.read(min(CHUNK_BYTES, count))
        if not data:
            raise OSError("the base file is truncated")
        new.write(data)
        count -= len(data)
