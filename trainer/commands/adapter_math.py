"""Commands that compute adapters: merge, resize, extract, bake. Torch is imported when one of them runs."""

import math
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from scumble.configs.errors import Refused

from ..system.formatting import format_bytes
from ..system.output_paths import check_out, check_place

SUFFIX = ".safetensors"
Method = Literal["linear", "svd", "ties", "dare", "dare_ties"]
OutFile = Annotated[Path, Parameter(help="File to write, .safetensors")]
Force = Annotated[bool, Parameter(help="Write over what is there", negative="", show_default=False)]
DoraBase = Annotated[str, Parameter(help="Only for DoRA: its base, a folder, a hub id, sketch or a .safetensors file")]
Strengths = Annotated[
    list[str] | None,
    Parameter(
        help="Strength of each adapter, in their order, such as 0.7 0.5; none: 1", consume_multiple=1, negative=""
    ),
]


def merge(
    *files: Annotated[Path, Parameter(help="Adapter files of one kind of base")],
    out: OutFile,
    weights: Strengths = None,
    blocks: Annotated[
        list[str] | None,
        Parameter(
            help="Factors in some blocks, as up_blocks.1=0.5 for all files or 2:text=0 for the second",
            consume_multiple=1,
            negative="",
        ),
    ] = None,
    method: Annotated[
        Method | None,
        Parameter(
            help="linear is the exact sum; svd cuts it to a rank; the others fight interference; none: linear, if small"
        ),
    ] = None,
    rank: Annotated[int, Parameter(help="Rank of the result, but for linear; 0: the largest of the files'")] = 0,
    density: Annotated[float | None, Parameter(help="Share of values that ties and dare keep; none: 0.5")] = None,
    seed: Annotated[int | None, Parameter(help="Draws of dare; none: 0")] = None,
    rslora: Annotated[
        bool, Parameter(help="Read alphas as rank-stabilised: alpha / √rank", negative="", show_default=False)
    ] = False,
    base: DoraBase = "",
    force: Force = False,
) -> None:
    """Merge adapters into one LoRA."""
    if not files:
        raise Refused("adapter merge: name at least one adapter file")
    check_out(out, SUFFIX, force, *files)
    check_used(method or "linear", density, seed)
    strengths = as_many(weights, files, "--weights")
    factors = block_factors(blocks or [], len(files))
    from ..adapters.adapter import read_adapter
    from ..adapters.merge import Input, Recipe, check_merge, check_size, rank_stabilised
    from ..adapters.merge import merge as merged
    from ..adapters.provenance import write_result
    from ..adapters.weights import find_weights

    adapters = [rank_stabilised(read_adapter(file)) if rslora else read_adapter(file) for file in files]
    inputs = [Input(*one) for one in zip(map(str, files), adapters, strengths, factors, strict=True)]
    recipe = Recipe(method or "linear", rank, 0.5 if density is None else density, seed or 0)
    dora_base = find_weights(place_of_base(base)) if base else None
    if not method:
        check_merge(inputs, recipe, dora_base)
        check_size(inputs)
    result = merged(inputs, recipe, dora_base)
    parts = zip(files, strengths, factors, strict=True)
    parents = ", ".join(f"{file.stem} x {weight:g}{_told(table)}" for file, weight, table in parts)
    how = recipe.method if recipe.method in ("linear", "svd") else f"{method}, density {recipe.density:g}"
    tell(write_result(result, adapters, out, f"merged with scumble ({how}): {parents}", force))
    if recipe.method.startswith("dare") and recipe.density < 1:
        print("dare drops values at random by design and keeps their mean: most of an error above is that noise")


def resize(
    file: Annotated[Path, Parameter(help="Adapter file")],
    /,
    *,
    out: OutFile,
    rank: Annotated[int, Parameter(help="The rank, or with --energy or --ratio the largest; 0: no limit")] = 0,
    energy: Annotated[float, Parameter(help="Share of each layer's squared norm to keep, such as 0.95")] = 0.0,
    ratio: Annotated[float, Parameter(help="Drop singular values below this share of a layer's largest")] = 0.0,
    base: DoraBase = "",
    force: Force = False,
) -> None:
    """Give an adapter a smaller rank: one for all layers, or for each the least that keeps enough."""
    check_out(out, SUFFIX, force, file)
    from ..adapters.adapter import read_adapter
    from ..adapters.lowrank import Rule
    from ..adapters.provenance import write_result
    from ..adapters.resize import resize as resized
    from ..adapters.weights import find_weights

    adapter = read_adapter(file)
    result = resized(adapter, Rule(rank, energy, ratio), str(file), find_weights(place_of_base(base)) if base else None)
    told = [f"{name} {value:g}" for name, value in (("rank", rank), ("energy", energy), ("ratio", ratio)) if value]
    comment = f"resized with scumble ({', '.join(told)}): {file.stem}"
    tell(write_result(result, [adapter], out, comment, force))
    pairs = [(adapter.modules[place], module) for place, module in result.adapter.modules.items()]
    if all(old.label == "LoRA" and old.rank == new.rank for old, new in pairs):
        print(f"nothing changed: no layer's rank became smaller than it was, {result.rank} at most")


def extract(
    tuned: Annotated[Path, Parameter(help="Fine-tuned model: a diffusers folder or a .safetensors file")],
    /,
    *,
    base: Annotated[str, Parameter(help="What it was tuned from: sketch, a folder, a hub id or a .safetensors file")],
    out: OutFile,
    rank: Annotated[int, Parameter(help="The rank, or with --energy the largest")] = 32,
    energy: Annotated[float, Parameter(help="Share of each layer's squared change to keep; 0: use the rank")] = 0.0,
    text: Annotated[bool, Parameter(help="Take the text encoders too", negative="--no-text")] = True,
    convs: Annotated[bool, Parameter(help="Take the convolutions too", negative="", show_default=False)] = False,
    dtype: Annotated[Literal["fp16", "bf16", "fp32"], Parameter(help="Number format of the result")] = "fp16",
    force: Force = False,
) -> None:
    """Make a LoRA of what fine-tuning changed in a model."""
    check_out(out, SUFFIX, force, tuned, Path(base))
    import torch

    from scumble.configs.options import Model

    from ..adapters.adapter import Adapter
    from ..adapters.extract import extract as extracted
    from ..adapters.lowrank import Rule
    from ..adapters.provenance import metadata_of_base, write_result
    from ..base_model.detect import detect_base

    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    source = detect_base(Model(base=base))
    result = extracted(Path(source.place), tuned, Rule(rank, energy), text, convs, dtypes[dtype])
    comment = f"extracted with scumble (rank {rank}{f', energy {energy:g}' if energy else ''}): {tuned.stem}"
    predicts_v = source.prediction == "v_prediction"
    told = metadata_of_base(source.family.name, predicts_v, source.resolution_px, source.name)
    tell(write_result(result, [Adapter({}, told, source.family.name)], out, comment, force))


def bake(
    *files: Annotated[Path, Parameter(help="Adapter files")],
    base: Annotated[str, Parameter(help="Base: sketch, a diffusers folder, a hub id or a .safetensors file")],
    out: Annotated[Path, Parameter(help="Folder or .safetensors file to write, as the base is")],
    strengths: Strengths = None,
    undo: Annotated[
        bool, Parameter(help="Take the adapters out of a baked base", negative="", show_default=False)
    ] = False,
    force: Force = False,
) -> None:
    """Add adapters into a base for good, or take them out again."""
    if not files:
        raise Refused("adapter bake: name at least one adapter file")
    check_place(out, *files)
    amounts = as_many(strengths, files, "--strengths")
    from ..adapters.adapter import read_adapter
    from ..adapters.bake import BakedAdapter
    from ..adapters.bake import bake as baked

    doses = [BakedAdapter(file.stem, read_adapter(file), amount) for file, amount in zip(files, amounts, strict=True)]
    tell(baked(place_of_base(base), out, doses, undo, force))
    files_out = out.rglob("*") if out.is_dir() else [out]
    print(f"wrote {out}: {format_bytes(sum(file.stat().st_size for file in files_out if file.is_file()))}")


def check_used(method: str, density: float | None, seed: int | None) -> None:
    """Raises `Refused` for numbers of methods against interference that another method would pass over."""
    if density is not None and method in ("linear", "svd"):
        raise Refused(f"--density {density:g}: {method} keeps all values; use --method ties, dare or dare_ties")
    if seed is not None and not method.startswith("dare"):
        raise Refused(f"--seed {seed}: {method} draws nothing; use --method dare or dare_ties")


def as_many(told: list[str] | None, files: tuple[Path, ...], flag: str) -> list[float]:
    """One finite number a file, with spaces or commas between. Raises `Refused` where there are more or fewer."""
    if not told:
        return [1.0] * len(files)
    try:
        numbers = [float(part) for part in ",".join(told).split(",")]
    except ValueError:
        raise Refused(f"{flag} {' '.join(told)}: must be numbers, such as 0.7 0.5") from None
    if len(numbers) != len(files):
        raise Refused(f"{flag}: {len(numbers)} numbers for {len(files)} files; give one each")
    for number in numbers:
        if not math.isfinite(number):
            raise Refused(f"{flag} {number:g}: use a finite number")
    return numbers


def block_factors(told: list[str], num_files: int) -> list[dict[str, float]]:
    """`up_blocks.1=0.5` for all files and `2:text=0` for the second, which goes before it -> a table for each file.

    With spaces or commas between. Raises `Refused` where one cannot be read or is told twice.
    """
    factors: dict[tuple[int, str], float] = {}  # by number of the file, 0 for all, and block
    for one in ",".join(told).split(",") if told else []:
        number, colon, rest = one.strip().rpartition(":")
        block, _, text = rest.partition("=")
        try:
            file, factor = int(number) if colon else 0, float(text)
        except ValueError:
            file, factor = -1, 0.0
        if not bool(colon) <= file <= num_files or not math.isfinite(factor):
            raise Refused(f"--blocks {one}: write BLOCK=FACTOR, or N:BLOCK=FACTOR for file N of {num_files}")
        if (file, block) in factors:
            raise Refused(f"--blocks {one}: {block} has been given {factors[file, block]:g} already")
        factors[file, block] = factor
    tables = ({block: factor for (file, block), factor in factors.items() if file == n} for n in range(num_files + 1))
    for_all, *own = tables
    return [for_all | table for table in own]


def place_of_base(base: str) -> Path:
    """Where a base lies on disk; only names that are no path (sketch, hub ids) are looked up."""
    if Path(base).exists() and base != "sketch":
        return Path(base)
    from scumble.configs.options import Model

    from ..base_model.detect import detect_base

    return Path(detect_base(Model(base=base)).place)


def tell(lines: list[str]) -> None:
    for line in lines:
        print(line)


def _told(blocks: dict[str, float]) -> str:
    return f" {blocks}".replace("'", "") if blocks else ""
