"""Convert an adapter file to another key dialect or number format, keeping its metadata.

Every UI reads kohya keys; diffusers saves PEFT keys. All arithmetic is in fp32 and rounded once at the end.
"""

from dataclasses import replace
from pathlib import Path

import torch

from scumble.configs.errors import Refused

from .adapter import Adapter, read_adapter, to_tensors
from .base_tags import detection, network
from .files import write_adapter
from .privacy import describe_removed_paths

DIALECTS = ("kohya", "peft")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
STALE = ("sshs_model_hash", "sshs_legacy_hash", "lora_adapter_metadata", "format")  # wrong or harmful after conversion


def convert(path: Path, dialect: str, dtype: str, out: Path, force: bool = False) -> list[str]:
    """Convert the adapter in `path` and write it to `out`. `dtype` is fp16, bf16, fp32, or empty to keep the file's.

    Returns lines to print about file paths removed from the metadata. Raises `Refused` if an option value is unknown
    or the dialect cannot hold the adapter.
    """
    if dialect not in DIALECTS:
        raise Refused(f"--to {dialect}: must be {' | '.join(DIALECTS)}")
    if dtype and dtype not in DTYPES:
        raise Refused(f"--dtype {dtype}: must be {' | '.join(DTYPES)}")
    adapter = read_adapter(path)
    try:
        tensors = converted(adapter, dialect, DTYPES.get(dtype))
    except Refused as refused:
        raise Refused(f"{path}: {refused}") from None
    fp16_tensors = tensors if dtype == "fp16" else {}
    overflowed = [name for name, tensor in fp16_tensors.items() if not torch.isfinite(tensor).all()]
    if overflowed:
        raise Refused(f"{out}: not written, {overflowed[0]} has values that overflow fp16; use --dtype bf16")
    return describe_removed_paths(write_adapter(tensors, metadata_for(adapter, dialect), out, force))


def converted(adapter: Adapter, dialect: str, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return the adapter's named tensors in a dialect. Without `dtype`, the adapter's dtype is kept."""
    modules = {
        layer: replace(module, tensors={slot: tensor.float() for slot, tensor in module.tensors.items()})
        for layer, module in adapter.modules.items()
    }
    tensors = to_tensors(replace(adapter, modules=modules), dialect)
    own_dtype = next((tensor.dtype for module in adapter.modules.values() for tensor in module.tensors.values()), None)
    return {
        name: tensor if name.endswith(".alpha") else tensor.to(dtype or own_dtype)  # alpha is a setting, always fp32
        for name, tensor in tensors.items()
    }


def metadata_for(adapter: Adapter, dialect: str) -> dict[str, str]:
    """Return the metadata without stale entries. For kohya, add the entries by which UIs detect the base.

    diffusers raises ValueError if a file has both `lora_adapter_metadata` and alphas. In a PEFT file, its alphas would
    be applied twice, since ours are folded into `lora_B`.
    """
    kept = {name: text for name, text in adapter.metadata.items() if name not in STALE}
    if dialect == "peft":
        return kept | {"format": "pt"}
    predicts_v = kept.get("modelspec.prediction_type") == "v"
    return detection(adapter.family, predicts_v) | kept | network(adapter.modules.values())
