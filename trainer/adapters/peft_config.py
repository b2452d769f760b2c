"""Scales of a PEFT file, which are not in it: from diffusers' metadata, or from PEFT's own config beside it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scumble.configs.errors import Refused

from .keys import COMPONENT_PREFIXES, ModulePath

ENTRY = "lora_adapter_metadata"  # diffusers' name in the metadata: JSON of `unet.lora_alpha`, `text_encoder.r`, …
PEFTS_NAMES = ("adapter_model.safetensors", "adapter_config.json")
MAX_CONFIG_BYTES = 2**20


def metadata_beside(path: Path) -> dict[str, str]:
    """PEFT's own config, where PEFT wrote the file, as the metadata that diffusers would have written into it."""
    weights, config = PEFTS_NAMES
    beside = path.with_name(config)
    if path.name != weights or not beside.is_file() or beside.stat().st_size > MAX_CONFIG_BYTES:
        return {}
    told = _table(beside.read_text(encoding="utf-8", errors="replace"))
    return {ENTRY: json.dumps({f"{part}.{key}": told[key] for part in COMPONENT_PREFIXES.values() for key in told})}


def settings_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings that metadata holds; none where it holds none that can be read."""
    return _table(metadata.get(ENTRY, "{}"))


def alpha_at(place: ModulePath, rank: int, settings: Mapping[str, Any], name: str) -> float | None:
    """alpha of a module such that alpha / rank is PEFT's scale; None where the settings do not tell it.

    `alpha_pattern` goes before `lora_alpha`; with rsLoRA the scale is alpha / sqrt(rank) (Kalajdzievski 2023).
    """
    prefix = COMPONENT_PREFIXES[place.component]
    patterns = settings.get(f"{prefix}.alpha_pattern") or {}
    alpha = settings.get(f"{prefix}.lora_alpha")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if not re.fullmatch(r"[\w.]+", pattern):  # a stranger's regex could run for ever
            raise Refused(f"{name}: its alpha_pattern {pattern[:80]} is no plain path, which alone is read")
        if f".{place.path}".endswith("." + pattern.removeprefix("text_model.")):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        return None
    return alpha * (rank**0.5 if settings.get(f"{prefix}.use_rslora") else 1.0)


def _table(text: str) -> dict[str, Any]:
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}
