"""Metadata of a computed adapter: its base, taken from the first parent, and how it was made."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..system.formatting import format_bytes
from .adapter import Adapter, to_tensors
from .base_tags import detection
from .factors import Reduction
from .files import write_adapter
from .privacy import describe_removed_paths

KEPT = (
    "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation", "modelspec.resolution",
    "modelspec.prediction_type", "ss_base_model_version", "ss_v2", "ss_clip_skip", "ss_resolution", "ss_sd_model_name",
)  # fmt: skip
MIN_SHOWN_ERROR = 0.0005  # smaller errors are not printed
TRIGGER = "modelspec.trigger_phrase"


def metadata_of_result(parents: Sequence[Adapter], result: Adapter, title: str, comment: str) -> dict[str, str]:
    """Return the metadata for `result`; `comment` says how it was made from `parents`.

    Base and architecture come from the first parent. The trigger phrases of all parents are joined. Entries about a
    single training run (images, steps, learning rates) are left out.
    """
    inherited = parents[0].metadata if parents else {}
    predicts_v = inherited.get("modelspec.prediction_type") == "v"
    entries = detection(result.family, predicts_v) | {name: inherited[name] for name in KEPT if name in inherited}
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


def write_result(result: Reduction, parents: Sequence[Adapter], out: Path, comment: str, force: bool) -> list[str]:
    """Write a computed adapter with kohya keys and its metadata, as `write_adapter` does.

    Returns the lines to print: the error of each block (largest first), removed file paths, and the file written.
    """
    metadata = metadata_of_result(parents, result.adapter, out.stem, comment)
    edited = write_adapter(to_tensors(result.adapter), metadata, out, force)
    errors = sorted(result.errors.items(), key=lambda item: -item[1])
    return [
        *(
            f"{block:<16} relative error {error:6.1%} ({error**2:.2%} of the energy is lost)"
            for block, error in errors
            if error > MIN_SHOWN_ERROR
        ),
        *describe_removed_paths(edited),
        f"wrote {out}: {len(result.adapter.modules)} layers, rank {result.rank}, {format_bytes(out.stat().st_size)}",
    ]


def metadata_of_base(family: str, predicts_v: bool, resolution_px: int, name: str) -> dict[str, str]:
    """Return metadata about the base for an adapter without a parent; `name` is the base's display name."""
    return detection(family, predicts_v) | {
        "modelspec.prediction_type": "v" if predicts_v else "epsilon",
        "modelspec.resolution": f"{resolution_px}x{resolution_px}",
        "ss_resolution": f"({resolution_px}, {resolution_px})",
        "ss_sd_model_name": name,
    }
