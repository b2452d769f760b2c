"""An adapter file -> the same adapter in another dialect or number format, with its metadata.

kohya's is what every UI reads; PEFT's is what `diffusers` saves. All arithmetic is in fp32, rounded once at the end.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from scumble.configs.errors import Refused

from .adapter import FAMILY_OF_VERSION, NETWORK_MODULES, Adapter, read_adapter, to_tensors
from .files import write_adapter

DIALECTS = ("kohya", "peft")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1/lora",
    "sd2": "stable-diffusion-v2-512/lora",
    "sdxl": "stable-diffusion-xl-v1-base/lora",
}
IMPLEMENTATIONS = {"sdxl": "https://github.com/Stability-AI/generative-models"}
STALE = ("sshs_model_hash", "sshs_legacy_hash", "lora_adapter_metadata", "format")  # no longer true, or harmful


def convert(path: Path, dialect: str, dtype: str, out: Path, force: bool = False) -> Path:
    """Write `path`'s adapter into `out`; `dtype` fp16, bf16, fp32, or empty for the file's own. Returns `out`.

    Raises `Refused` where a choice is unknown, `out` is `path`, or the adapter has no place in the dialect.
    """
    if dialect not in DIALECTS:
        raise Refused(f"--to {dialect}: must be {' | '.join(DIALECTS)}")
    if dtype and dtype not in DTYPES:
        raise Refused(f"--dtype {dtype}: must be {' | '.join(DTYPES)}")
    if out.resolve() == path.resolve():
        raise Refused(f"--out {out}: is the file that is read; choose another name")
    adapter = read_adapter(path)
    tensors = converted(adapter, dialect, DTYPES.get(dtype))
    overflown = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if overflown and dtype == "fp16":
        raise Refused(f"{out} was not written: {overflown[0]} has numbers that fp16 cannot hold; use --dtype bf16")
    write_adapter(tensors, metadata_for(adapter, dialect), out, force)
    return out


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
    return _detection(adapter, kept) | kept | _network(adapter)


def _detection(adapter: Adapter, told: Mapping[str, str]) -> dict[str, str]:
    """What A1111, Forge and InvokeAI look at, told by the adapter itself."""
    version = next(version for version, family in FAMILY_OF_VERSION.items() if family == adapter.family)
    architecture = ARCHITECTURES[adapter.family]
    if adapter.family == "sd2" and told.get("modelspec.prediction_type") == "v":
        architecture = "stable-diffusion-v2-768-v/lora"
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": IMPLEMENTATIONS.get(adapter.family, "diffusers"),
        "ss_base_model_version": version,
        "ss_v2": str(adapter.family == "sd2"),
    }


def _network(adapter: Adapter) -> dict[str, str]:
    """kohya's settings of the network, those that most modules have."""
    kinds = Counter(module.kind for module in adapter.modules.values())
    pairs = Counter((module.rank, module.scale * module.rank) for module in adapter.modules.values() if module.rank)
    told = {"ss_network_module": NETWORK_MODULES[kinds.most_common(1)[0][0]]}
    if pairs:
        (rank, alpha), _ = pairs.most_common(1)[0]
        told |= {"ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    return told
