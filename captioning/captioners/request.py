"""A captioning request as plain values."""

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
    """Everything that determines the caption of an image, and the device that computes it.

    `threshold` is the minimum probability of a tag. `trigger_position` is `front`, `end` or `none`. `drop` lists words
    and tags to remove.
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

    def fingerprint(self, image: bytes) -> str:
        """Hash of everything that changes the caption: the request without device and precision, and `image`."""
        values = asdict(self) | {"device": "", "precision": ""}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode() + image).hexdigest()
