"""Metadata of a computed adapter: what base it is for, from its first parent, and how it was made."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..system.formatting import format_bytes
from .adapter import Adapter, to_tensors
from .base_tags import detection
from .factors import Reduction
from .files import write_adapter
from .privacy import words_for_cut

KEPT = (
    "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation", "modelspec.resolution",
    "modelspec.prediction_type", "ss_base_model_version", "ss_v2", "ss_clip_skip", "ss_resolution", "ss_sd_model_name",
)  # fmt: skip
LOSS_TOLD = 0.0005  # smaller losses are shown as none
TRIGGER = "modelspec.trigger_phrase"


def metadata_of_result(parents: Sequence[Adapter], result: Adapter, title: str, comment: str) -> dict[str, str]:
    """Metadata for `result`, made of `parents` as `comment` tells; base and architecture are the first parent's.

    What is known only of one training (pictures, steps, rates) is left out; trigger phrases of all are joined.
    """
    told = parents[0].metadata if parents else {}
    predicts_v = told.get("modelspec.prediction_type") == "v"
    entries = detection(result.family, predicts_v) | {name: told[name] for name in KEPT if name in told}
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
    """Write a computed adapter under kohya's names with its metadata, as `write_adapter` does.

    Returns what to say of it, a line each: what every block loses, the most first, what was cut, what was written.
    """
    metadata = metadata_of_result(parents, result.adapter, out.stem, comment)
    cut = write_adapter(to_tensors(result.adapter), metadata, out, force)
    losses = sorted(result.errors.items(), key=lambda item: -item[1])
    return [
        *(
            f"{block:<16} error {error:6.1%} of its norm ({error**2:.2%} of its energy is lost)"
            for block, error in losses
            if error > LOSS_TOLD
        ),
        *words_for_cut(cut),
        f"wrote {out}: {len(result.adapter.modules)} layers, rank {result.rank}, {format_bytes(out.stat().st_size)}",
    ]


def metadata_of_base(family: str, predicts_v: bool, resolution_px: int, name: str) -> dict[str, str]:
    """What an adapter that comes from no other one tells of its base, which people know by `name`."""
    return detection(family, predicts_v) | {
        "modelspec.prediction_type": "v" if predicts_v else "epsilon",
        "modelspec.resolution": f"{resolution_px}x{resolution_px}",
        "ss_resolution": f"({resolution_px}, {resolution_px})",
        "ss_sd_model_name": name,
    }
