"""Preview prompts: from options, from a text file (also in kohya's format), or derived from the captions."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scumble.configs.errors import Refused
from scumble.configs.options import Previews
from scumble.datasets.captions import framed

SUBJECTS = (
    "red apple", "tiger", "rocket", "princess", "castle", "sailboat",
    "owl", "pizza", "cactus", "guitar", "car", "ghost",
)  # fmt: skip
DEFAULT_PROMPTS = [f"{subject}, {style} style" for style in ("shaded", "flat") for subject in SUBJECTS]
UNRELATED_SUBJECTS = ("tiger", "castle", "rocket", "teapot", "lighthouse", "violin")
KOHYA_FLAG = re.compile(r"\s--([nwhdsl])\s+")


@dataclass(frozen=True)
class PreviewPrompt:
    """All settings of one preview image. Sizes are in pixels; None means the base's default."""

    prompt: str
    negative_prompt: str
    width: int | None
    height: int | None
    seed: int
    num_inference_steps: int
    guidance_scale: float


def preview_prompts(
    previews: Previews, size_px: int | None, defaults: Sequence[str], guidance_scale: float
) -> list[PreviewPrompt]:
    """Return the prompts from the options, or `defaults` if there are none."""
    lines = list(previews.prompts) + (_lines_of(Path(previews.prompt_file)) if previews.prompt_file else [])
    side = size_px if previews.preview_size == "auto" else previews.preview_size
    return [
        _parsed(
            line,
            PreviewPrompt(
                line, previews.negative_prompt, side, side, previews.preview_seed + index, previews.num_inference_steps,
                guidance_scale if previews.guidance_scale == "auto" else previews.guidance_scale,
            ),
        )
        for index, line in enumerate(lines or defaults)
    ]  # fmt: skip


def prompts_from_captions(captions: Sequence[str], prefix: str = "", suffix: str = "") -> list[str]:
    """Return three captions spread over the set, and a prompt for an unrelated subject with the tags they share.

    Tags count as shared if most captions have them. `captions` are training prompts, which include `prefix` and
    `suffix`; both are added to the fourth prompt too.
    """
    unique = list(dict.fromkeys(filter(None, captions))) or [""]
    chosen = [unique[index * (len(unique) - 1) // 2] for index in range(min(3, len(unique)))]
    before, after = framed("\0", prefix, suffix).split("\0")
    distinct = list(dict.fromkeys(caption.removeprefix(before).removesuffix(after) for caption in unique))
    counts = Counter(tag.strip() for caption in distinct for tag in set(caption.split(",")) if tag.strip())
    shared = [tag for tag, count in counts.items() if count > 0.8 * len(distinct)]
    text = " ".join(distinct).lower()
    subject = next((subject for subject in UNRELATED_SUBJECTS if subject not in text), UNRELATED_SUBJECTS[0])
    first = [tag for tag in shared if distinct[0].startswith(tag)]
    last = [tag for tag in shared if tag not in first]
    unrelated = framed(", ".join([*first, subject, *last]), prefix, suffix)
    return list(dict.fromkeys([*chosen, unrelated]))


def _lines_of(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Refused(f"--prompt-file {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise Refused(f"--prompt-file {path}: is not UTF-8; save it as UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def _parsed(line: str, default: PreviewPrompt) -> PreviewPrompt:
    """Parse kohya's format: prompt --n negative --w width --h height --d seed --s steps --l guidance_scale."""
    prompt, *rest = KOHYA_FLAG.split(line)
    flags = dict(zip(rest[::2], (value.strip() for value in rest[1::2]), strict=True))
    try:
        return PreviewPrompt(
            prompt.strip(),
            flags.get("n", default.negative_prompt),
            int(flags["w"]) // 8 * 8 if "w" in flags else default.width,
            int(flags["h"]) // 8 * 8 if "h" in flags else default.height,
            int(flags.get("d", default.seed)),
            int(flags.get("s", default.num_inference_steps)),
            float(flags.get("l", default.guidance_scale)),
        )
    except ValueError:
        raise Refused(f"--prompts {line!r}: invalid value for --w, --h, --d, --s or --l; use a number") from None


def default_guidance_scale(base_name: str) -> float:
    """Return the default guidance scale of a base. The small embedded base gives cleaner images with less guidance."""
    return 5.0 if base_name == "sketch" else 7.0
