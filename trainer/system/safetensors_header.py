"""Read and write the header of a safetensors file without torch.

The length, the JSON, and the dtype, shape and offsets of each tensor are validated before anything is allocated.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from scumble.configs.errors import Refused

MAX_HEADER_BYTES = 64 * 2**20  # the header of an SDXL checkpoint has 0.4 MiB
MAX_READ_METADATA_BYTES = 8 * 2**20
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U8": 1, "U16": 2, "U32": 4, "U64": 8, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor in the header. `start` and `end` are byte offsets from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def to_json(self) -> dict[str, object]:
        """The JSON object of this tensor in the header."""
        return {"dtype": self.dtype, "shape": list(self.shape), "data_offsets": [self.start, self.end]}


@dataclass(frozen=True)
class Header:
    """A parsed header. `size` is the number of bytes before the first tensor, including the length field."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    size: int


def read_header(path: Path) -> Header:
    """Read and validate the header of a safetensors file. Raises `Refused` if it is invalid or cannot be read."""
    if path.is_dir():
        raise Refused(f"{path}: is a folder; name a .safetensors file in it")
    if path.exists() and not path.is_file():  # opening a pipe would block
        raise Refused(f"{path}: not a regular file")
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > total - 8:
                raise Refused(
                    f"{path}: not a safetensors file (shorter than its header length); copy or download it again"
                )
            if length > MAX_HEADER_BYTES:
                raise Refused(f"{path}: the header has {length:,} bytes; the limit is {MAX_HEADER_BYTES:,}")
            raw = file.read(length)
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise Refused(f"{path}: not a safetensors file ({_short(error)})") from None
    if not isinstance(table, dict):
        raise Refused(f"{path}: not a safetensors file (the header is not a JSON object)")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Refused(f"{path}: the metadata is not an object with string values")
    if (metadata_size := sum(len(key) + len(value) for key, value in metadata.items())) > MAX_READ_METADATA_BYTES:
        raise Refused(
            f"{path}: the metadata has {metadata_size:,} characters; the limit is {MAX_READ_METADATA_BYTES:,}"
        )
    entries = {name: _entry(path, name, value) for name, value in table.items()}
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise Refused(f"{path}: tensor {_short(name)} overlaps another or leaves a gap")
        position = entry.end
    if position != total - 8 - length:
        raise Refused(
            f"{path}: contains {total - 8 - length:,} bytes of tensors, but its header describes {position:,}; copy or "
            "download it again"
        )
    return Header(entries, metadata, 8 + length)


def header_bytes(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    """Serialize a header: its length and its JSON, padded to a multiple of 8 bytes."""
    table = ({"__metadata__": dict(metadata)} if metadata else {}) | dict(entries)
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _entry(path: Path, name: str, value: object) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise Refused(f"{path}: tensor {_short(name)} must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    is_list = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not is_list or not all(type(number) is int and 0 <= number < 2**63 for number in [*shape, *offsets]):
        raise Refused(f"{path}: tensor {_short(name)} has an invalid shape or invalid offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise Refused(f"{path}: tensor {_short(name)} has the unknown dtype {_short(dtype)}")
    start, end = offsets
    if end - start != prod(shape) * ITEM_BYTES[dtype]:
        raise Refused(f"{path}: tensor {_short(name)} has {end - start:,} bytes, which does not match its shape")
    return Entry(dtype, tuple(shape), start, end)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("duplicate name in the header")
    return table


def _short(text: object) -> str:
    shown = str(text).replace("\n", " ")
    return shown if len(shown) <= 80 else shown[:79] + "…"
