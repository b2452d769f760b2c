"""Metadata of a computed adapter: what base it is for, from its first parent, and how it was made; never a path."""

import json
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath

from ..models import FAMILIES, Source
from .adapter import Adapter, to_tensors
from .factors import Reduction
from .files import write_adapter

KEPT = (
    "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation", "modelspec.resolution",
    "modelspec.prediction_type", "ss_base_model_version", "ss_v2", "ss_clip_skip", "ss_resolution",
)  # fmt: skip
TRIGGER = "modelspec.trigger_phrase"


def metadata_of_result(parents: Sequence[Adapter], result: Adapter, title: str, comment: str) -> dict[str, str]:
    """Metadata for `result`, made of `parents` as `comment` tells; base and architecture are the first parent's.

    What is known only of one training (pictures, steps, rates) is left out; trigger phrases of all are joined.
    """
    told = parents[0].metadata if parents else {}
    entries = for_family(result.family) | {name: told[name] for name in KEPT if name in told}
    if told.get("ss_sd_model_name"):
        entries["ss_sd_model_name"] = base_name(told["ss_sd_model_name"])
    triggers = dict.fromkeys(parent.metadata[TRIGGER] for parent in parents if parent.metadata.get(TRIGGER))
    if triggers:
        entries[TRIGGER] = ", ".join(triggers)
    rank = max(module.rank for module in result.modules.values())
    return entries | {
        "modelspec.title": title,
        "ss_output_name": title,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{float(rank):g}",
        "ss_network_args": json.dumps({}),
        "ss_training_comment": comment,
    }


def write_result(result: Reduction, parents: Sequence[Adapter], out: Path, comment: str, force: bool) -> None:
    """Write a computed adapter under kohya's names with its metadata. Raises `Refused` as `write_adapter` does."""
    metadata = metadata_of_result(parents, result.adapter, out.stem, comment)
    write_adapter(to_tensors(result.adapter), metadata, out, force)


def metadata_of_base(source: Source) -> dict[str, str]:
    """What an adapter that comes from no other one tells of its base."""
    v = source.prediction == "v_prediction"
    told = for_family(source.family.name)
    if source.family.name == "sd2" and not v:
        told["modelspec.architecture"] = "stable-diffusion-v2-512/lora"
    side = source.resolution_px
    return told | {
        "modelspec.prediction_type": "v" if v else "epsilon",
        "modelspec.resolution": f"{side}x{side}",
        "ss_resolution": f"({side}, {side})",
        "ss_sd_model_name": source.name,
    }


def for_family(family: str) -> dict[str, str]:
    """What tells UIs the kind of base, for `family` sd1, sd2 or sdxl."""
    one = FAMILIES[family]
    sgm = family == "sdxl"
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": one.architecture,
        "modelspec.implementation": (
            "https://github.com/Stability-AI/generative-models" if sgm else "diffusers"
        ),
        "ss_base_model_version": one.version,
        "ss_v2": str(family == "sd2"),
    }  # fmt: skip


def base_name(text: str) -> str:
    """The last part of what may be a path of either kind."""
    return PureWindowsPath(text).name or "unknown"
