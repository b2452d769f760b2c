"""Which adapter keys each diffusion UI loads: a base's layers -> the key stems that its loader accepts.

Follows the rules of ComfyUI 0.3.64, A1111 1.10.1, Forge (June 2025), InvokeAI 6.14 and diffusers 0.42. For a key that
matches no layer, a UI ignores the key or rejects the whole file, and seldom reports it where an artist would see it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .keys import COMPONENT_PREFIXES, SLOT, SLOTS, ModulePath, sgm_path

LYCORIS = tuple(slot for slot in SLOTS if slot.startswith(("hada_", "lokr_")))
PLAIN = ("lora_down.weight", "lora_up.weight", "alpha")
KOHYA = (*PLAIN, "lora_mid.weight", "dora_scale", "diff", "diff_b", *LYCORIS)
PEFT = (
    "lora_A.weight", "lora_B.weight", "lora.down.weight", "lora.up.weight",
    "lora_linear_layer.down.weight", "lora_linear_layer.up.weight",
)  # fmt: skip
OLD_PROCESSOR = ("_lora.down.weight", "_lora.up.weight")  # follows the stem without a dot
FORGE_MAX_UNMATCHED = 12  # Forge rejects files with more unmatched tensors
INVOKE_PREFIXES = {
    "sd1": ("lora_unet_", "lora_te_"),
    "sd2": ("lora_unet_", "lora_te_"),
    "sdxl": ("lora_unet_", "lora_te1_", "lora_te2_"),
}


@dataclass(frozen=True)
class Ui:
    """A loader: the stems it accepts for a layout and a family, the slots it accepts, and when it rejects a file."""

    name: str
    stems: Callable[[Iterable[ModulePath], str], set[str]]
    slots: tuple[str, ...]
    refusal: Callable[[Sequence[str], Sequence[str], str], str]  # (names, unmatched names, family) -> reason, or empty


@dataclass(frozen=True)
class Match:
    """How many of a file's modules a UI matches to a layer. `ignored` lists the key stems that match no layer."""

    ui: str
    matched: int
    total: int
    ignored: tuple[str, ...]
    refusal: str

    @property
    def is_complete(self) -> bool:
        return self.matched == self.total and not self.refusal


def matches(names: Iterable[str], layout: Iterable[ModulePath], family: str) -> list[Match]:
    """Match the tensor `names` in each UI against a base with the layers `layout` (family sd1, sd2 or sdxl).

    A module counts as matched if all its tensors match. A UI that rejects the file matches none.
    """
    names, layout = list(names), list(layout)
    owners = {name: stem_of(name) for name in names}
    modules = set(owners.values())
    results = []
    for ui in UIS:
        known = ui.stems(layout, family)
        unmatched = [name for name in names if not _is_matched(name, known, ui.slots)]
        ignored = {owners[name] for name in unmatched}
        refusal = ui.refusal(names, unmatched, family)
        matched = 0 if refusal else len(modules - ignored)
        results.append(Match(ui.name, matched, len(modules), tuple(sorted(ignored)), refusal))
    return results


def stem_of(name: str) -> str:
    """Return a tensor name without its slot. All tensors of one module share this stem."""
    for suffix in OLD_PROCESSOR:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    found = SLOT.match(name)
    return found["stem"] if found else name.rpartition(".")[0]


def ldm_path(path: str, family: str) -> str:
    """Return a UNet layer's path in a checkpoint. In SD 1 and 2, the first up block has no attention."""
    if family != "sdxl" and path == "up_blocks.0.upsamplers.0.conv":
        return "output_blocks.2.1.conv"
    return sgm_path(path)


def comfyui(layout: Iterable[ModulePath], family: str) -> set[str]:
    """Flattened diffusers and checkpoint names, unflattened checkpoint names, and pre-PEFT diffusers names.

    PEFT's `attn1.to_q` is not matched (it is looked up as `attn1.processor.to_q`), but PEFT's `proj_in` and `ff` are.
    """
    stems = set()
    for layer in layout:
        if layer.component == "unet":
            own, old = ldm_path(layer.path, family), _old_processor(layer.path)
            stems |= {_flat("lora_unet_", own), _flat("lora_unet_", layer.path), _flat("lycoris_", layer.path)}
            stems |= {f"diffusion_model.{own}", old, f"unet.{old}"}
        else:
            prefixes = ("lora_te_", "lora_te1_") if layer.component == "text" else ("lora_te2_",)
            stems |= {_flat(prefix + "text_model_", layer.path) for prefix in prefixes}
            stems.add(f"{COMPONENT_PREFIXES[layer.component]}.text_model.{layer.path}")
    return stems


def a1111(layout: Iterable[ModulePath], family: str) -> set[str]:
    """All checkpoint names match. Patterns convert diffusers names to checkpoint names, but they miss `add_embedding`,
    and the upsampler of SDXL's first up block, because they do not expect attention there.
    """
    stems = set()
    for layer in layout:
        if layer.component == "unet":
            stems.add(_flat("lora_unet_", ldm_path(layer.path, family)))
            missed = layer.path.startswith("add_embedding") or (
                family == "sdxl" and layer.path == "up_blocks.0.upsamplers.0.conv"
            )
            stems |= set() if missed else {_flat("lora_unet_", layer.path)}
        else:
            prefixes = {"sd1": ("lora_te_", "lora_te1_"), "sd2": ("lora_te_",), "sdxl": ("lora_te1_",)}[family]
            prefixes = ("lora_te2_",) if layer.component == "text2" else prefixes
            stems |= {_flat(prefix + "text_model_", layer.path) for prefix in prefixes}
    return stems


def invokeai(layout: Iterable[ModulePath], family: str) -> set[str]:
    """Flattened diffusers paths; sgm names and the prefix `lora_te1_` only on SDXL."""
    stems = set()
    for layer in layout:
        if layer.component == "unet":
            stems.add(_flat("lora_unet_", layer.path))
            if family == "sdxl":
                stems.add(_flat("lora_unet_", sgm_path(layer.path)))
        else:
            prefix = {"text": "lora_te1_", "text2": "lora_te2_"}[layer.component] if family == "sdxl" else "lora_te_"
            stems.add(_flat(prefix + "text_model_", layer.path))
    return stems


def diffusers(layout: Iterable[ModulePath], family: str) -> set[str]:
    """PEFT names with or without `text_model.`, and kohya names: sgm only on SDXL, `add_embedding` only as sgm."""
    stems = set()
    for layer in layout:
        if layer.component == "unet":
            stems |= {f"unet.{layer.path}", f"unet.{_old_processor(layer.path)}"}
            if not layer.path.startswith("add_embedding"):
                stems.add(_flat("lora_unet_", layer.path))
            if family == "sdxl":
                stems.add(_flat("lora_unet_", sgm_path(layer.path)))
        else:
            peft = COMPONENT_PREFIXES[layer.component]
            prefixes = ("lora_te_", "lora_te1_") if layer.component == "text" else ("lora_te2_",)
            stems |= {f"{peft}.{layer.path}", f"{peft}.text_model.{layer.path}"}
            stems |= {_flat(prefix + "text_model_", layer.path) for prefix in prefixes}
    return stems


def _never(names: Sequence[str], unmatched: Sequence[str], family: str) -> str:
    return ""


def _forge(names: Sequence[str], unmatched: Sequence[str], family: str) -> str:
    return f"{len(unmatched)} tensors match no layer" if len(unmatched) > FORGE_MAX_UNMATCHED else ""


def _invokeai(names: Sequence[str], unmatched: Sequence[str], family: str) -> str:
    """Its probe accepts only kohya prefixes. On SDXL, sgm and diffusers block names must not be mixed."""
    if not any(name.startswith(INVOKE_PREFIXES[family]) for name in names):
        return "no kohya keys"
    if family == "sdxl":
        unknown = [name for name in names if not name.startswith(INVOKE_PREFIXES[family])]
        if unknown:
            return f"unknown prefix: {unknown[0]}"
        sgm = ("lora_unet_input_", "lora_unet_output_", "lora_unet_middle_", "lora_unet_time_embed_",
               "lora_unet_label_", "lora_unet_out_")  # fmt: skip
        if len({name.startswith(sgm) for name in names if name.startswith("lora_unet_")}) > 1:
            return "sgm and diffusers block names are mixed"
    return ""


def _diffusers(names: Sequence[str], unmatched: Sequence[str], family: str) -> str:
    """It drops DoRA magnitudes with a warning, and raises on any other kohya key that it cannot rename."""
    kohya = [name for name in unmatched if name.startswith("lora_") and not name.endswith(".dora_scale")]
    return f"cannot rename {kohya[0]}" if kohya else ""


def _is_matched(name: str, stems: set[str], slots: Sequence[str]) -> bool:
    for slot in slots:
        end = slot if slot in OLD_PROCESSOR else f".{slot}"
        if name.endswith(end) and name.removesuffix(end) in stems:
            return True
    return False


def _flat(prefix: str, path: str) -> str:
    return prefix + path.replace(".", "_")


def _old_processor(path: str) -> str:
    old = path.replace(".to_", ".processor.to_")
    return old.removesuffix(".0") if old.endswith(".to_out.0") else old


UIS = (
    Ui("ComfyUI", comfyui, (*KOHYA, *PEFT, *OLD_PROCESSOR), _never),
    Ui("A1111", a1111, (*KOHYA, *PEFT[:2]), _never),
    Ui("Forge", comfyui, (*KOHYA, *PEFT, *OLD_PROCESSOR), _forge),
    Ui("InvokeAI", invokeai, KOHYA, _invokeai),
    Ui("diffusers", diffusers, (*PLAIN, *PEFT, *OLD_PROCESSOR), _diffusers),
)
