"""An adapter file -> the same adapter in another dialect or number format, with its metadata.

kohya's is what every UI reads; PEFT's is what `diffusers` saves. All arithmetic is in fp32, rounded once at the end.
"""

from dataclasses import replace
from pathlib import Path

import torch

from scumble.configs.errors import Refused

from .adapter import Adapter, read_adapter, to_tensors
from .base_tags import detection, network
from .files import write_adapter
from .privacy import words_for_cut

DIALECTS = ("kohya", "peft")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
STALE = ("sshs_model_hash", "sshs_legacy_hash", "lora_adapter_metadata", "format")  # no longer true, or harmful


def convert(path: Path, dialect: str, dtype: str, out: Path, force: bool = False) -> list[str]:
    """Write `path`'s adapter into `out`; `dtype` fp16, bf16, fp32, or empty for the file's own.

    Returns what to say of paths that were cut out of its metadata. Raises `Refused` where a choice is unknown or
    the adapter has no place in the dialect.
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
    halves = tensors if dtype == "fp16" else {}
    overflown = [name for name, tensor in halves.items() if not torch.isfinite(tensor).all()]
    if overflown:
        raise Refused(f"{out} was not written: {overflown[0]} has numbers that fp16 cannot hold; use --dtype bf16")
    return words_for_cut(write_adapter(tensors, metadata_for(adapter, dialect), out, force))


def converted(adapter: Adapter, dialect: str, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The adapter's named tensors in a dialect; without `dtype` each has the type that its module had."""
    modules = {
        place: replace(module, tensors={slot: tensor.float() for slot, tensor in module.tensors.items()})
        for place, module in adapter.modules.items()
    }
    tensors = to_tensors(replace(adapter, modules=modules), dialect)
    own = next((tensor.dtype for module in adapter.modules.values() for tensor in module.tensors.values()), None)
    return {
        name: tensor if name.endswith(".alpha") else tensor.to(dtype or own)  # an alpha is a setting, kept whole
        for name, tensor in tensors.items()
    }


def metadata_for(adapter: Adapter, dialect: str) -> dict[str, str]:
    """The file's metadata without what is no longer true; kohya's gets what UIs need to tell its base.

    `lora_adapter_metadata` must not stand beside alphas (diffusers: ValueError), and in a PEFT file its alphas
    would count twice, since ours are in `lora_B`.
    """
    kept = {name: text for name, text in adapter.metadata.items() if name not in STALE}
    if dialect == "peft":
        return kept | {"format": "pt"}
    predicts_v = kept.get("modelspec.prediction_type") == "v"
    return detection(adapter.family, predicts_v) | kept | network(adapter.modules.values())
