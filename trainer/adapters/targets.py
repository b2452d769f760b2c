"""Which layers an adapter is put on: presets, regexes, and the share of each component."""

import re
from dataclasses import dataclass

from scumble.configs.errors import Refused

ATTENTION = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
FULL = r".*\.attentions\.\d+\.(proj_in|proj_out|.*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2))"
CONVS = r".*\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|.*\.(downsamplers|upsamplers)\.0\.conv"
LAYOUT = 2  # another number for another order of `laid_out`, which an optimiser's state follows
TEXT = r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
PRESET_TARGETS = {"attention": ATTENTION, "full": FULL}


@dataclass(frozen=True)
class Part:
    """The adapter's share of one component: `name` is unet, text or text2; alpha / rank is its scale."""

    name: str
    rank: int
    alpha: float
    conv_rank: int = 0
    conv_alpha: float = 0.0


def check_targets(targets: str, paths: list[str]) -> None:
    """Raises `Refused` where `targets` is no preset's name and no regex that matches a whole path."""
    try:
        chosen = re.compile(PRESET_TARGETS.get(targets, targets))
    except re.error as error:
        raise Refused(f"--targets {targets}: neither attention nor full, and no regex ({error})") from None
    if not any(chosen.fullmatch(path) for path in paths):
        raise Refused(f"--targets {targets}: no layer of the UNet has such a path; use attention, full or a regex")
