"""What is asked of a captioner, in plain values."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

SubjectKind = Literal["style", "character"]
Detail = Literal["short", "medium", "long"]
Device = Literal["auto", "cuda", "cpu", "mps"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Existing = Literal["keep", "replace", "append", "prepend", "line"]
Category = Literal["general", "character", "copyright", "artist", "meta", "rating"]


@dataclass(frozen=True)
class Request:
    """All that decides what is written for a picture, and where it is computed.

    `threshold` is the least probability of a tag; `trigger_position` is `front`, `end` or `none`; `drop` are words.
    """

    captioner: str
    model: str
    subject: SubjectKind
    detail: Detail
    prompt: str
    max_tokens: int
    threshold: float
    character_threshold: float
    categories: tuple[str, ...]
    keep_underscores: bool
    trigger: str
    trigger_position: str
    drop: tuple[str, ...]
    device: Device = "auto"
    precision: Precision = "auto"

    def fingerprint(self, picture: bytes) -> str:
        """Hash of everything that changes what is written: this request without the device, and the picture's own."""
        told = asdict(self) | {"device": "", "precision": ""}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode() + picture).hexdigest()
