"""The header of a safetensors file: what it holds, checked before anything is allocated: its length, its JSON, each
tensor's type, shape and place in the file. Nothing here needs torch.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from scumble.configs.errors import Refused

MAX_HEADER_BYTES = 64 * 2**20  # an SDXL checkpoint's is 0.4 MiB
MAX_READ_METADATA_BYTES = 8 * 2**20
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U8": 1, "U16": 2, "U32": 4, "U64": 8, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor as the header tells it: `start` and `end` count from the first byte behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def told(self) -> dict[str, object]:
        """As the header writes it."""
        return {"dtype": self.dtype, "shape": list(self.shape), "data_offsets": [self.start, self.end]}


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds; `size` is the number of bytes before its first tensor."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    size: int


def read_header(path: Path) -> Header:
    """The checked header of a safetensors file. Raises `Refused` naming the file and what is wrong with it."""
    if path.is_dir():
        raise Refused(f"{path}: is a folder; name a .safetensors file in it")
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise Refused(f"{path}: is no file")
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > total - 8:
                raise Refused(
                    f"{path}: not a safetensors file (it is shorter than its header says): copy or download it again"
                )
            if length > MAX_HEADER_BYTES:
                raise Refused(f"{path}: a header of {length:,} bytes; more than {MAX_HEADER_BYTES:,} are not read")
            raw = file.read(length)
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        told = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise Refused(f"{path}: not a safetensors file ({_short(error)})") from None
    if not isinstance(told, dict):
        raise Refused(f"{path}: not a safetensors file (its header is no table)")
    metadata = told.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Refused(f"{path}: its metadata is not a table of texts")
    if (told_bytes := sum(len(key) + len(value) for key, value in metadata.items())) > MAX_READ_METADATA_BYTES:
        raise Refused(
            f"{path}: {told_bytes:,} characters of metadata; more than {MAX_READ_METADATA_BYTES:,} are not read"
        )
    entries = {name: _entry(path, name, value) for name, value in told.items()}
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise Refused(f"{path}: tensor {_short(name)} overlaps another or leaves a gap")
        position = entry.end
    if position != total - 8 - length:
        raise Refused(
            f"{path}: holds {total - 8 - length:,} bytes of tensors, its header tells of {position:,}; copy or "
            "download it again"
        )
    return Header(entries, metadata, 8 + length)


def header_bytes(told: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    """The length and the JSON of a header that tells of tensors as `told` does, filled up to 8 bytes."""
    table = ({"__metadata__": dict(metadata)} if metadata else {}) | dict(told)
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _entry(path: Path, name: str, told: object) -> Entry:
    if not isinstance(told, dict) or told.keys() != {"dtype", "shape", "data_offsets"}:
        raise Refused(f"{path}: tensor {_short(name)} lacks its type, shape or place")
    dtype, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
    whole = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not whole or not all(type(number) is int and 0 <= number < 2**63 for number in [*shape, *offsets]):
        raise Refused(f"{path}: tensor {_short(name)} has an impossible shape or place")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise Refused(f"{path}: tensor {_short(name)} has the unknown type {_short(dtype)}")
    start, end = offsets
    if end - start != prod(shape) * ITEM_BYTES[dtype]:
        raise Refused(f"{path}: tensor {_short(name)} has {end - start:,} bytes, not those of its shape")
    return Entry(dtype, tuple(shape), start, end)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return table


def _short(text: object) -> str:
    shown = str(text).replace("\n", " ")
    return shown if len(shown) <= 80 else shown[:79] + "…"
