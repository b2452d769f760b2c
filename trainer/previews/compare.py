"""Compare adapters in one labeled grid of prompts × strengths × files, rendered by stock diffusers.

diffusers loads LoRA files itself. It does not support other kinds, so those are applied to the weights row by row.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from scumble.configs.errors import Refused, printable
from scumble.configs.options import Model, Previews
from scumble.configs.progress import tracked

from ..adapters.adapter import Adapter, read_adapter
from ..adapters.applied import applied
from ..adapters.compatibility import check_fit
from ..adapters.inspect import diffusers_limit, network_of, tag_counts
from ..adapters.weights import find_weights
from ..base_model.detect import DetectedBase, detect_base
from ..base_model.load import Base, load
from ..system.device import best_device, device_may_fail
from .gallery import render_dtype
from .grid import cell, grid, write_png
from .prompts import SUBJECTS, PreviewPrompt, default_guidance_scale, preview_prompts
from .sampling import render

STRENGTH_LIMIT = 10.0
STRENGTHS = ("0", "0.5", "0.8", "1", "1.2")
MAX_LABEL_LENGTH = 32
COMPARE_SUBJECTS = SUBJECTS[0], SUBJECTS[4]  # a small object and a scene
MAX_WORDS_LENGTH = 200  # of trigger words from metadata
ADAPTER_NAME = "compared"


def compare(files: Sequence[Path], model: Model, previews: Previews, strengths: Sequence[float], out: Path) -> None:
    """Render every prompt (column) with every file at every strength (row) and write the grid to `out`.

    Strength 0 is the base without an adapter, so it is rendered once, as the first row. Raises `Refused` if a file is
    for another base, or if `model` must name the base and does not.
    """
    adapters = [read_adapter(file) for file in files]
    if "base" not in model.model_fields_set:
        model = model.model_copy(update={"base": base_of(files, adapters)})
    source = detect_base(model)
    for file, adapter in zip(files, adapters, strict=True):
        check_renderable(file, adapter, source)
    prompts = preview_prompts(previews, None, prompts_of(adapters), default_guidance_scale(model.base))
    device = torch.device(best_device())
    amounts = [strength for strength in strengths if strength]
    with_base = len(amounts) < len(strengths)
    labels = [*(["no adapter"] if with_base else []), *(f"{name} @ {n:g}" for name in names_of(files) for n in amounts)]

    def rendered_rows() -> Iterator[list[Image.Image]]:
        base = load(model, source, device, render_dtype(device))
        if with_base:
            yield render(base, prompts, previews.sampler)
        for file, adapter in zip(files, adapters, strict=True):
            yield from render_strengths(base, file, adapter, prompts, amounts, previews.sampler)

    with device_may_fail(device):
        rows = [[cell(image) for image in row] for row in tracked(rendered_rows(), "rendering", len(labels))]
    above = [[prompt.prompt for prompt in prompts], *([] for _ in rows[1:])]
    write_png(grid(rows, above, labels), out)


def render_strengths(
    base: Base, file: Path, adapter: Adapter, prompts: Sequence[PreviewPrompt], strengths: Sequence[float], sampler: str
) -> Iterator[list[Image.Image]]:
    """Yield the images of all prompts at each strength of one adapter file. The base is restored afterwards."""
    if diffusers_limit(network_of(adapter)):
        for strength in strengths:
            with applied(base, adapter, strength):
                yield render(base, prompts, sampler)
        return
    base.pipeline.load_lora_weights(str(file), adapter_name=ADAPTER_NAME)
    for strength in strengths:
        base.pipeline.set_adapters([ADAPTER_NAME], [strength])
        yield render(base, prompts, sampler)
    base.pipeline.unload_lora_weights()


def prompts_of(adapters: Sequence[Adapter]) -> list[str]:
    """Return the default prompts: each adapter's trigger words alone, and with two subjects."""
    triggers = dict.fromkeys(filter(None, map(words_of, adapters)))
    subjects = COMPARE_SUBJECTS
    return [prompt for words in triggers for prompt in (words, *(f"{one}, {words}" for one in subjects))] or [*subjects]


def words_of(adapter: Adapter) -> str:
    """Return an adapter's trigger phrase, or its most common tag, or an empty string."""
    ranked = [*tag_counts(adapter.metadata).most_common(2), ("", 1), ("", 1)]
    shared = ranked[0][0] if ranked[0][1] > ranked[1][1] else ""
    words = adapter.metadata.get("modelspec.trigger_phrase") or shared
    return printable(words).replace("--", " ").strip()[:MAX_WORDS_LENGTH]  # `--` would start kohya flags


def strengths_of(values: Sequence[str]) -> list[float]:
    """Parse strengths separated by commas or spaces, such as `0,0.5,1`, and drop duplicates.

    Raises `Refused` if one is not a number or is outside the range that UIs offer.
    """
    text = ",".join(values)
    try:
        strengths = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        strengths = []
    if not strengths or not all(math.isfinite(number) and abs(number) <= STRENGTH_LIMIT for number in strengths):
        raise Refused(
            f"--strengths {text}: must be numbers from -{STRENGTH_LIMIT:g} to {STRENGTH_LIMIT:g}, such as 0,0.5,1"
        )
    return list(dict.fromkeys(strengths))


def base_of(files: Sequence[Path], adapters: Sequence[Adapter]) -> str:
    """Return `sketch` if every file was trained on it. Raises `Refused` otherwise, since the base must be named."""
    for file, adapter in zip(files, adapters, strict=True):
        name = adapter.metadata.get("ss_sd_model_name", "")
        if name != "sketch":
            reason = f"was trained on {name[:80]}" if name else "does not name its base in the metadata"
            raise Refused(f"{file}: {reason}; name the base with --base FILE")
    return "sketch"


def check_renderable(file: Path, adapter: Adapter, source: DetectedBase) -> None:
    """Raises `Refused` if an adapter does not fit the base."""
    if adapter.family != source.family.name:
        raise Refused(
            f"{file}: made for {adapter.family}, but --base {source.name} is {source.family.name}; "
            "use a base of the same family"
        )
    check_fit(str(file), adapter, find_weights(Path(source.path)))


def names_of(files: Sequence[Path]) -> list[str]:
    """Return short names for labels, prefixed with the folder if two files have the same name."""
    stems = [file.stem for file in files]
    names = [
        f"{file.resolve().parent.name}/{stem}" if stems.count(stem) > 1 else stem
        for file, stem in zip(files, stems, strict=True)
    ]
    return [name if len(name) <= MAX_LABEL_LENGTH else "…" + name[1 - MAX_LABEL_LENGTH :] for name in names]
