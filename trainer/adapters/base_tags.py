"""Metadata that identifies the base model family of an adapter file. A1111 hides files without it."""

from collections import Counter
from collections.abc import Iterable

from .module import Module

VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}  # family -> ss_base_model_version
FAMILY_OF_VERSION = {version: family for family, version in VERSIONS.items()}
FAMILY_OF_CONTEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # by cross_attention_dim
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1/lora",
    "sd2": "stable-diffusion-v2-512/lora",
    "sdxl": "stable-diffusion-xl-v1-base/lora",
}
SD2_V = "stable-diffusion-v2-768-v/lora"
SGM = "https://github.com/Stability-AI/generative-models"
NETWORK_MODULES = {"lora": "networks.lora", "loha": "lycoris.kohya", "lokr": "lycoris.kohya", "full": "lycoris.kohya"}


def detection(family: str, predicts_v: bool) -> dict[str, str]:
    """Return the metadata by which programs detect the base; `family` is sd1, sd2 or sdxl."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": SD2_V if family == "sd2" and predicts_v else ARCHITECTURES[family],
        "modelspec.implementation": SGM if family == "sdxl" else "diffusers",
        "ss_base_model_version": VERSIONS[family],
        "ss_v2": str(family == "sd2"),
    }


def network(modules: Iterable[Module]) -> dict[str, str]:
    """Return kohya's network settings: the kind, rank and alpha that most modules have."""
    modules = list(modules)
    kind = Counter(module.kind for module in modules).most_common(1)[0][0]
    metadata = {"ss_network_module": NETWORK_MODULES[kind]}
    pairs = Counter((module.rank, module.scale * module.rank) for module in modules if module.rank)
    if pairs:
        (rank, alpha), _ = pairs.most_common(1)[0]
        metadata |= {"ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    return metadata
