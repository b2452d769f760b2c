"""Which adapter keys each diffusion UI knows: a base's layers -> the key stems that its loader would accept.

Written from the rules of ComfyUI 0.3.64, A1111 1.10.1, Forge (June 2025), InvokeAI 6.14 and diffusers 0.42. A UI passes
over a key without a home, or turns the whole file away; it seldom says so where an artist would look.
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
OLD_PROCESSOR = ("_lora.down.weight", "_lora.up.weight")  # stands behind the stem without a dot
FORGE_TOLERATES = 12  # tensors without a home; with more, Forge turns the file away
INVOKE_PREFIXES = {
    "sd1": ("lora_unet_", "lora_te_"),
    "sd2": ("lora_unet_", "lora_te_"),
    "sdxl": ("lora_unet_", "lora_te1_", "lora_te2_"),
}


@dataclass(frozen=True)
class Ui:
    """A loader: the stems it knows for a layout and a family, what may follow a stem, and when it refuses a file."""

    name: str
    stems: Callable[[Iterable[ModulePath], str], set[str]]
    slots: tuple[str, ...]
    refusal: Callable[[Sequence[str], Sequence[str], str], str]  # (names, homeless names, family) -> why, or nothing


@dataclass(frozen=True)
class Match:
    """How many of a file's modules a UI finds a layer for; `lost` are the stems that it does not know."""

    ui: str
    matched: int
    total: int
    lost: tuple[str, ...]
    refusal: str

    @property
    def is_whole(self) -> bool:
        return self.matched == self.total and not self.refusal


def matches(names: Iterable[str], layout: Iterable[ModulePath], family: str) -> list[Match]:
    """For each UI how the tensors `names` fare on a base with the layers `layout` (family sd1, sd2 or sdxl).

    A module counts when all its tensors have a home. A UI that refuses the file takes none of it.
    """
    names, layout = list(names), list(layout)
    owners = {name: stem_of(name) for name in names}
    modules = set(owners.values())
    found = []
    for ui in UIS:
        known = ui.stems(layout, family)
        homeless = [name for name in names if not _has_home(name, known, ui.slots)]
        lost = {owners[name] for name in homeless}
        refusal = ui.refusal(names, homeless, family)
        found.append(Match(ui.name, 0 if refusal else len(modules - lost), len(modules), tuple(sorted(lost)), refusal))
    return found


def stem_of(name: str) -> str:
    """A tensor's name without its slot: what the tensors of one module have in common."""
    for suffix in OLD_PROCESSOR:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    found = SLOT.match(name)
    return found["stem"] if found else name.rpartition(".")[0]


def ldm_path(path: str, family: str) -> str:
    """The path of a UNet layer in a checkpoint; in SD 1 and 2 the first up block has no attention before its conv."""
    if family != "sdxl" and path == "up_blocks.0.upsamplers.0.conv":
        return "output_blocks.2.1.conv"
    return sgm_path(path)


def comfyui(layout: Iterable[ModulePath], family: str) -> set[str]:
    """Flattened names of either grammar, the checkpoint's own, and diffusers' names from before PEFT.

    PEFT's `attn1.to_q` is not known (it is looked up as `attn1.processor.to_q`), PEFT's `proj_in` or `ff` is.
    """
    stems = set()
    for place in layout:
        if place.component == "unet":
            own, old = ldm_path(place.path, family), _old_processor(place.path)
            stems |= {_flat("lora_unet_", own), _flat("lora_unet_", place.path), _flat("lycoris_", place.path)}
            stems |= {f"diffusion_model.{own}", old, f"unet.{old}"}
        else:
            prefixes = ("lora_te_", "lora_te1_") if place.component == "text" else ("lora_te2_",)
            stems |= {_flat(prefix + "text_model_", place.path) for prefix in prefixes}
            stems.add(f"{COMPONENT_PREFIXES[place.component]}.text_model.{place.path}")
    return stems


def a1111(layout: Iterable[ModulePath], family: str) -> set[str]:
    """Names of diffusers are turned into the checkpoint's by patterns, which know neither `add_embedding` nor that
    SDXL's first up block has attention (so its upsampler is lost); the checkpoint's own names all fit.
    """
    stems = set()
    for place in layout:
        if place.component == "unet":
            stems.add(_flat("lora_unet_", ldm_path(place.path, family)))
            lost = place.path.startswith("add_embedding") or (
                family == "sdxl" and place.path == "up_blocks.0.upsamplers.0.conv"
            )
            stems |= set() if lost else {_flat("lora_unet_", place.path)}
        else:
            prefixes = {"sd1": ("lora_te_", "lora_te1_"), "sd2": ("lora_te_",), "sdxl": ("lora_te1_",)}[family]
            prefixes = ("lora_te2_",) if place.component == "text2" else prefixes
            stems |= {_flat(prefix + "text_model_", place.path) for prefix in prefixes}
    return stems


def invokeai(layout: Iterable[ModulePath], family: str) -> set[str]:
    """Flattened paths of diffusers' modules; those of sgm only on SDXL, and `lora_te1_` only there."""
    stems = set()
    for place in layout:
        if place.component == "unet":
            stems.add(_flat("lora_unet_", place.path))
            if family == "sdxl":
                stems.add(_flat("lora_unet_", sgm_path(place.path)))
        else:
            prefix = {"text": "lora_te1_", "text2": "lora_te2_"}[place.component] if family == "sdxl" else "lora_te_"
            stems.add(_flat(prefix + "text_model_", place.path))
    return stems


def diffusers(layout: Iterable[ModulePath], family: str) -> set[str]:
    """PEFT's names with or without `text_model.`, and kohya's: sgm's only on SDXL, `add_embedding` only as sgm's."""
    stems = set()
    for place in layout:
        if place.component == "unet":
            stems |= {f"unet.{place.path}", f"unet.{_old_processor(place.path)}"}
            if not place.path.startswith("add_embedding"):
                stems.add(_flat("lora_unet_", place.path))
            if family == "sdxl":
                stems.add(_flat("lora_unet_", sgm_path(place.path)))
        else:
            peft = COMPONENT_PREFIXES[place.component]
            prefixes = ("lora_te_", "lora_te1_") if place.component == "text" else ("lora_te2_",)
            stems |= {f"{peft}.{place.path}", f"{peft}.text_model.{place.path}"}
            stems |= {_flat(prefix + "text_model_", place.path) for prefix in prefixes}
    return stems


def _never(names: Sequence[str], homeless: Sequence[str], family: str) -> str:
    return ""


def _forge(names: Sequence[str], homeless: Sequence[str], family: str) -> str:
    return f"{len(homeless)} tensors without a home" if len(homeless) > FORGE_TOLERATES else ""


def _invokeai(names: Sequence[str], homeless: Sequence[str], family: str) -> str:
    """Only kohya's prefixes pass its probe; on SDXL sgm's and diffusers' block names must not be mixed."""
    if not any(name.startswith(INVOKE_PREFIXES[family]) for name in names):
        return "not kohya's keys"
    if family == "sdxl":
        foreign = [name for name in names if not name.startswith(INVOKE_PREFIXES[family])]
        if foreign:
            return f"no such prefix: {foreign[0]}"
        sgm = ("lora_unet_input_", "lora_unet_output_", "lora_unet_middle_", "lora_unet_time_embed_",
               "lora_unet_label_", "lora_unet_out_")  # fmt: skip
        if len({name.startswith(sgm) for name in names if name.startswith("lora_unet_")}) > 1:
            return "mixes two kinds of block names"
    return ""


def _diffusers(names: Sequence[str], homeless: Sequence[str], family: str) -> str:
    """It drops DoRA's magnitudes with a warning, and raises on any other key of kohya's that it cannot rename."""
    kohya = [name for name in homeless if name.startswith("lora_") and not name.endswith(".dora_scale")]
    return f"cannot rename {kohya[0]}" if kohya else ""


def _has_home(name: str, stems: set[str], slots: Sequence[str]) -> bool:
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
