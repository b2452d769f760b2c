"""What previews show: prompts from options, a text file, kohya's prompt lines, or derived from the captions."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scumble.configs.errors import Refused
from scumble.configs.options import Previews
from scumble.datasets.captions import framed

SHOWN_WORDS = (
    "red apple", "tiger", "rocket", "princess", "castle", "sailboat",
    "owl", "pizza", "cactus", "guitar", "car", "ghost",
)  # fmt: skip
SHOWN_PROMPTS = [f"{word}, {style} style" for style in ("shaded", "flat") for word in SHOWN_WORDS]
FAR_THINGS = ("tiger", "castle", "rocket", "teapot", "lighthouse", "violin")
KOHYA_FLAG = re.compile(r"\s--([nwhdsl])\s+")


@dataclass(frozen=True)
class PreviewPrompt:
    """One preview: everything that decides its picture. Sizes in pixels, None for the base's own."""

    prompt: str
    negative_prompt: str
    width: int | None
    height: int | None
    seed: int
    num_inference_steps: int
    guidance_scale: float


def preview_prompts(previews: Previews, size_px: int | None, prompts: Sequence[str], cfg: float) -> list[PreviewPrompt]:
    """The shots that the options name; where they name none, those of `prompts`."""
    lines = list(previews.prompts) + (_lines_of(Path(previews.prompt_file)) if previews.prompt_file else [])
    side = size_px if previews.preview_size == "auto" else previews.preview_size
    return [
        _parsed(
            line,
            PreviewPrompt(
                line, previews.negative_prompt, side, side, previews.preview_seed + index, previews.num_inference_steps,
                cfg if previews.guidance_scale == "auto" else previews.guidance_scale,
            ),
        )
        for index, line in enumerate(lines or prompts)
    ]  # fmt: skip


def prompts_from_captions(captions: Sequence[str], prefix: str = "", suffix: str = "") -> list[str]:
    """Three captions from over the set, and one prompt far from them with the words that all captions share.

    `captions` are as training says them; `prefix` and `suffix`, which stand around them, stand around that one too.
    """
    heard = list(dict.fromkeys(filter(None, captions))) or [""]
    chosen = [heard[index * (len(heard) - 1) // 2] for index in range(min(3, len(heard)))]
    before, after = framed("\0", prefix, suffix).split("\0")
    distinct = list(dict.fromkeys(caption.removeprefix(before).removesuffix(after) for caption in heard))
    counts = Counter(tag.strip() for caption in distinct for tag in set(caption.split(",")) if tag.strip())
    shared = [tag for tag, count in counts.items() if count > 0.8 * len(distinct)]
    said = " ".join(distinct).lower()
    thing = next((thing for thing in FAR_THINGS if thing not in said), FAR_THINGS[0])
    first = [tag for tag in shared if distinct[0].startswith(tag)]
    last = [tag for tag in shared if tag not in first]
    far = framed(", ".join([*first, thing, *last]), prefix, suffix)
    return list(dict.fromkeys([*chosen, far]))


def _lines_of(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Refused(f"--prompt-file {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise Refused(f"--prompt-file {path} is not UTF-8: save it as UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def _parsed(line: str, default: PreviewPrompt) -> PreviewPrompt:
    """kohya's line: prompt, then --n negative, --w width, --h height, --d seed, --s steps, --l guidance scale."""
    prompt, *rest = KOHYA_FLAG.split(line)
    said = dict(zip(rest[::2], (value.strip() for value in rest[1::2]), strict=True))
    try:
        return PreviewPrompt(
            prompt.strip(),
            said.get("n", default.negative_prompt),
            int(said["w"]) // 8 * 8 if "w" in said else default.width,
            int(said["h"]) // 8 * 8 if "h" in said else default.height,
            int(said.get("d", default.seed)),
            int(said.get("s", default.num_inference_steps)),
            float(said.get("l", default.guidance_scale)),
        )
    except ValueError:
        raise Refused(f"--prompts {line!r}: a number after --w, --h, --d, --s or --l cannot be read") from None


def default_guidance_scale(base_name: str) -> float:
    """Guidance that suits the base: the embedded one is small and paints cleaner with less."""
    return 5.0 if base_name == "sketch" else 7.0
