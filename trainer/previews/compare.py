"""Adapters beside each other: prompts × strengths × files as one labelled grid, painted by stock diffusers.

LoRA is loaded by diffusers itself. It knows no other kind, so those are put into the weights for the time of a row.
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
from ..adapters.inspect import beyond_diffusers, network_of, tag_counts
from ..adapters.weights import find_weights
from ..base_model.detect import DetectedBase, detect_base
from ..base_model.load import Base, load
from ..system.device import best_device, device_may_fail
from .gallery import render_dtype
from .grid import cell, grid, write_png
from .prompts import SHOWN_WORDS, PreviewPrompt, default_guidance_scale, preview_prompts
from .sampling import render

STRENGTH_LIMIT = 10.0
STRENGTHS = ("0", "0.5", "0.8", "1", "1.2")
LABEL_LETTERS = 32  # of a file's name
THINGS = SHOWN_WORDS[0], SHOWN_WORDS[4]  # a small thing and a scene
MOST_LETTERS = 200  # of words that are taken from metadata
LOADED = "compared"


def compare(files: Sequence[Path], model: Model, previews: Previews, strengths: Sequence[float], out: Path) -> None:
    """Paint every prompt with every file at every strength; a row is one file at one strength, a column one prompt.

    Strength 0 is the base alone, the same for all files, so it is painted once, as the first row. Raises
    `Refused` where a file is for another base, or its base must be named.
    """
    adapters = [read_adapter(file) for file in files]
    if "base" not in model.model_fields_set:
        model = model.model_copy(update={"base": base_of(files, adapters)})
    source = detect_base(model)
    for file, adapter in zip(files, adapters, strict=True):
        check_renderable(file, adapter, source)
    shots = preview_prompts(previews, None, prompts_of(adapters), default_guidance_scale(model.base))
    device = torch.device(best_device())
    amounts = [strength for strength in strengths if strength]
    alone = len(amounts) < len(strengths)
    labels = [*(["no adapter"] if alone else []), *(f"{name} @ {n:g}" for name in names_of(files) for n in amounts)]

    def painted() -> Iterator[list[Image.Image]]:
        base = load(model, source, device, render_dtype(device))
        if alone:
            yield render(base, shots, previews.sampler)
        for file, adapter in zip(files, adapters, strict=True):
            yield from render_strengths(base, file, adapter, shots, amounts, previews.sampler)

    with device_may_fail(device):
        rows = [[cell(picture) for picture in row] for row in tracked(painted(), "painting", len(labels))]
    above = [[shot.prompt for shot in shots], *([] for _ in rows[1:])]
    write_png(grid(rows, above, labels), out)


def render_strengths(
    base: Base, file: Path, adapter: Adapter, shots: Sequence[PreviewPrompt], strengths: Sequence[float], sampler: str
) -> Iterator[list[Image.Image]]:
    """The shots at each strength of one file, whose content is `adapter`; the base is left as it was."""
    if beyond_diffusers(network_of(adapter)):
        for strength in strengths:
            with applied(base, adapter, strength):
                yield render(base, shots, sampler)
        return
    base.pipeline.load_lora_weights(str(file), adapter_name=LOADED)
    for strength in strengths:
        base.pipeline.set_adapters([LOADED], [strength])
        yield render(base, shots, sampler)
    base.pipeline.unload_lora_weights()


def prompts_of(adapters: Sequence[Adapter]) -> list[str]:
    """What is painted where no prompt is named: each adapter's own words alone, and with two things."""
    words = dict.fromkeys(filter(None, map(words_of, adapters)))
    return [prompt for own in words for prompt in (own, *(f"{thing}, {own}" for thing in THINGS))] or list(THINGS)


def words_of(adapter: Adapter) -> str:
    """An adapter's trigger, or the tag that most of its captions have, or nothing."""
    ranked = [*tag_counts(adapter.metadata).most_common(2), ("", 1), ("", 1)]
    shared = ranked[0][0] if ranked[0][1] > ranked[1][1] else ""
    words = adapter.metadata.get("modelspec.trigger_phrase") or shared
    return printable(words).replace("--", " ").strip()[:MOST_LETTERS]  # a stranger's flags would set sizes


def strengths_of(told: Sequence[str]) -> list[float]:
    """`0,0.5,1`, with commas or spaces between -> numbers, each once.

    Raises `Refused` where one is none, or is beyond what any UI offers.
    """
    text = ",".join(told)
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
    """The embedded base where every file was trained on it; any other must be named."""
    for file, adapter in zip(files, adapters, strict=True):
        told = adapter.metadata.get("ss_sd_model_name", "")
        if told != "sketch":
            on = f"was trained on {told[:80]}" if told else "does not tell its base"
            raise Refused(f"{file}: {on}; name the base to paint with: --base FILE")
    return "sketch"


def check_renderable(file: Path, adapter: Adapter, source: DetectedBase) -> None:
    """Raises `Refused` for an adapter of another base."""
    if adapter.family != source.family.name:
        raise Refused(
            f"{file}: is for {adapter.family}, but --base {source.name} is {source.family.name}; "
            "name a base of its kind"
        )
    check_fit(str(file), adapter, find_weights(Path(source.place)))


def names_of(files: Sequence[Path]) -> list[str]:
    """Short names for labels; with the folder in front where two files share one."""
    stems = [file.stem for file in files]
    names = [
        f"{file.resolve().parent.name}/{stem}" if stems.count(stem) > 1 else stem
        for file, stem in zip(files, stems, strict=True)
    ]
    return [name if len(name) <= LABEL_LETTERS else "…" + name[1 - LABEL_LETTERS :] for name in names]
