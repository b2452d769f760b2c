"""Select the layers that an adapter trains: presets, regexes, and the rank of each component."""

import re
from dataclasses import dataclass

from scumble.configs.errors import Refused

ATTENTION = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
FULL = r".*\.attentions\.\d+\.(proj_in|proj_out|.*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2))"
CONVS = r".*\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|.*\.(downsamplers|upsamplers)\.0\.conv"
LAYOUT = 2  # bump if the order of `memory_order` changes, since the optimizer state depends on it
TEXT = r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
PRESET_TARGETS = {"attention": ATTENTION, "full": FULL}


@dataclass(frozen=True)
class Part:
    """The part of the adapter in one component: `name` is unet, text or text2; the scale is alpha / rank."""

    name: str
    rank: int
    alpha: float
    conv_rank: int = 0
    conv_alpha: float = 0.0


def check_targets(targets: str, paths: list[str]) -> None:
    """Raises `Refused` if `targets` is neither a preset name nor a regex that fully matches a path."""
    try:
        chosen = re.compile(PRESET_TARGETS.get(targets, targets))
    except re.error as error:
        raise Refused(f"--targets {targets}: not a valid regex ({error}); use attention, full or a regex") from None
    if not any(chosen.fullmatch(path) for path in paths):
        raise Refused(f"--targets {targets}: matches no UNet layer; use attention, full or a regex for a whole path")
