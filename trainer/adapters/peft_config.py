"""Read the scales of a PEFT file from diffusers' metadata or from PEFT's `adapter_config.json` next to the file."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scumble.configs.errors import Refused

from .keys import COMPONENT_PREFIXES, ModulePath

ENTRY = "lora_adapter_metadata"  # diffusers' metadata key: JSON with `unet.lora_alpha`, `text_encoder.r`, …
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
MAX_CONFIG_BYTES = 2**20


def metadata_beside(path: Path) -> dict[str, str]:
    """Return the config of a file that PEFT wrote, in the form of the metadata that diffusers writes into files."""
    weights, config = PEFT_FILES
    config_path = path.with_name(config)
    if path.name != weights or not config_path.is_file() or config_path.stat().st_size > MAX_CONFIG_BYTES:
        return {}
    settings = _json_object(config_path.read_text(encoding="utf-8", errors="replace"))
    prefixed = {f"{prefix}.{key}": settings[key] for prefix in COMPONENT_PREFIXES.values() for key in settings}
    return {ENTRY: json.dumps(prefixed)}


def settings_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the PEFT settings in the metadata; empty if there are none or they cannot be parsed."""
    return _json_object(metadata.get(ENTRY, "{}"))


def alpha_at(layer: ModulePath, rank: int, settings: Mapping[str, Any], name: str) -> float | None:
    """Return the alpha for which alpha / rank is PEFT's scale, or None if the settings do not contain it.

    `alpha_pattern` overrides `lora_alpha`. With rsLoRA, the scale is alpha / sqrt(rank) (Kalajdzievski 2023).
    """
    prefix = COMPONENT_PREFIXES[layer.component]
    patterns = settings.get(f"{prefix}.alpha_pattern") or {}
    alpha = settings.get(f"{prefix}.lora_alpha")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if not re.fullmatch(r"[\w.]+", pattern):  # an untrusted regex could take forever
            raise Refused(f"{name}: alpha_pattern {pattern[:80]} is a regex, only plain module paths are supported")
        if f".{layer.path}".endswith("." + pattern.removeprefix("text_model.")):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        return None
    return alpha * (rank**0.5 if settings.get(f"{prefix}.use_rslora") else 1.0)


def _json_object(text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}
