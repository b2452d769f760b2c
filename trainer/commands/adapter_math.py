"""Commands that compute adapters: merge, resize, extract, bake. Torch is imported when a command runs."""

import math
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from scumble.configs.errors import Refused

from ..system.formatting import format_bytes
from ..system.output_paths import check_out, check_path

SUFFIX = ".safetensors"
Method = Literal["linear", "svd", "ties", "dare", "dare_ties"]
OutFile = Annotated[Path, Parameter(help="Output file (.safetensors)")]
Force = Annotated[bool, Parameter(help="Overwrite an existing output", negative="", show_default=False)]
DoraBase = Annotated[str, Parameter(help="Only for DoRA: its base (sketch, a folder, a hub id or a .safetensors file)")]
Strengths = Annotated[
    list[str] | None,
    Parameter(
        help="Strength of each adapter, in order, such as 0.7 0.5; default: 1 each", consume_multiple=1, negative=""
    ),
]


def merge(
    *files: Annotated[Path, Parameter(help="Adapter files of one base family")],
    out: OutFile,
    weights: Strengths = None,
    blocks: Annotated[
        list[str] | None,
        Parameter(
            help="Factors for single blocks: up_blocks.1=0.5 for all files, 2:text=0 for the second file",
            consume_multiple=1,
            negative="",
        ),
    ] = None,
    method: Annotated[
        Method | None,
        Parameter(
            help="linear: exact sum; svd: truncated sum; ties, dare: less interference; default: linear if small enough"
        ),
    ] = None,
    rank: Annotated[int, Parameter(help="Rank of the result, except for linear; 0: largest rank of the files")] = 0,
    density: Annotated[float | None, Parameter(help="Share of values that ties and dare keep; default: 0.5")] = None,
    seed: Annotated[int | None, Parameter(help="Seed for dare; default: 0")] = None,
    rslora: Annotated[
        bool, Parameter(help="Use rank-stabilized scales, alpha / √rank", negative="", show_default=False)
    ] = False,
    base: DoraBase = "",
    force: Force = False,
) -> None:
    """Merge adapters into one LoRA."""
    if not files:
        raise Refused("adapter merge: name at least one adapter file")
    check_out(out, SUFFIX, force, *files)
    check_method_options(method or "linear", density, seed)
    strengths = one_per_file(weights, files, "--weights")
    factors = block_factors(blocks or [], len(files))
    from ..adapters.adapter import read_adapter
    from ..adapters.merge import Input, Recipe, check_merge, check_size, rank_stabilized
    from ..adapters.merge import merge as merged
    from ..adapters.provenance import write_result
    from ..adapters.weights import find_weights

    adapters = [rank_stabilized(read_adapter(file)) if rslora else read_adapter(file) for file in files]
    inputs = [Input(*one) for one in zip(map(str, files), adapters, strengths, factors, strict=True)]
    recipe = Recipe(method or "linear", rank, 0.5 if density is None else density, seed or 0)
    dora_base = find_weights(base_path(base)) if base else None
    if not method:
        check_merge(inputs, recipe, dora_base)
        check_size(inputs)
    result = merged(inputs, recipe, dora_base)
    parts = zip(files, strengths, factors, strict=True)
    parents = ", ".join(f"{file.stem} x {weight:g}{_format_blocks(table)}" for file, weight, table in parts)
    how = recipe.method if recipe.method in ("linear", "svd") else f"{method}, density {recipe.density:g}"
    print_lines(write_result(result, adapters, out, f"merged with scumble ({how}): {parents}", force))
    if recipe.method.startswith("dare") and recipe.density < 1:
        print("note: dare drops values at random and preserves their mean; most of the error above is that noise")


def resize(
    file: Annotated[Path, Parameter(help="Adapter file")],
    /,
    *,
    out: OutFile,
    rank: Annotated[int, Parameter(help="Rank, or maximum rank with --energy or --ratio; 0: no limit")] = 0,
    energy: Annotated[float, Parameter(help="Share of each layer's squared norm to keep, such as 0.95")] = 0.0,
    ratio: Annotated[float, Parameter(help="Drop singular values below this fraction of a layer's largest")] = 0.0,
    base: DoraBase = "",
    force: Force = False,
) -> None:
    """Reduce the rank of an adapter: to one rank for all layers, or per layer to the smallest that keeps enough."""
    check_out(out, SUFFIX, force, file)
    from ..adapters.adapter import read_adapter
    from ..adapters.lowrank import Rule
    from ..adapters.provenance import write_result
    from ..adapters.resize import resize as resized
    from ..adapters.weights import find_weights

    adapter = read_adapter(file)
    result = resized(adapter, Rule(rank, energy, ratio), str(file), find_weights(base_path(base)) if base else None)
    limits = [f"{name} {value:g}" for name, value in (("rank", rank), ("energy", energy), ("ratio", ratio)) if value]
    comment = f"resized with scumble ({', '.join(limits)}): {file.stem}"
    print_lines(write_result(result, [adapter], out, comment, force))
    pairs = [(adapter.modules[layer], module) for layer, module in result.adapter.modules.items()]
    if all(old.label == "LoRA" and old.rank == new.rank for old, new in pairs):
        print(f"note: no layer's rank was reduced; the largest rank is {result.rank}")


def extract(
    tuned: Annotated[Path, Parameter(help="Fine-tuned model: a diffusers folder or a .safetensors file")],
    /,
    *,
    base: Annotated[str, Parameter(help="Its base model: sketch, a folder, a hub id or a .safetensors file")],
    out: OutFile,
    rank: Annotated[int, Parameter(help="Rank, or maximum rank with --energy")] = 32,
    energy: Annotated[float, Parameter(help="Share of each layer's squared change to keep; 0: use --rank")] = 0.0,
    text: Annotated[bool, Parameter(help="Include the text encoders", negative="--no-text")] = True,
    convs: Annotated[bool, Parameter(help="Include the convolutions", negative="", show_default=False)] = False,
    dtype: Annotated[Literal["fp16", "bf16", "fp32"], Parameter(help="Number format of the result")] = "fp16",
    force: Force = False,
) -> None:
    """Extract a LoRA from the difference between a fine-tuned model and its base."""
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
    result = extracted(Path(source.path), tuned, Rule(rank, energy), text, convs, dtypes[dtype])
    comment = f"extracted with scumble (rank {rank}{f', energy {energy:g}' if energy else ''}): {tuned.stem}"
    predicts_v = source.prediction == "v_prediction"
    metadata = metadata_of_base(source.family.name, predicts_v, source.resolution_px, source.name)
    print_lines(write_result(result, [Adapter({}, metadata, source.family.name)], out, comment, force))


def bake(
    *files: Annotated[Path, Parameter(help="Adapter files")],
    base: Annotated[str, Parameter(help="Base: sketch, a diffusers folder, a hub id or a .safetensors file")],
    out: Annotated[Path, Parameter(help="Output folder or .safetensors file, the same type as the base")],
    strengths: Strengths = None,
    undo: Annotated[
        bool, Parameter(help="Subtract the adapters from a baked base", negative="", show_default=False)
    ] = False,
    force: Force = False,
) -> None:
    """Merge adapters into a base permanently, or subtract them again."""
    if not files:
        raise Refused("adapter bake: name at least one adapter file")
    check_path(out, *files)
    amounts = one_per_file(strengths, files, "--strengths")
    from ..adapters.adapter import read_adapter
    from ..adapters.bake import BakedAdapter
    from ..adapters.bake import bake as baked

    pairs = zip(files, amounts, strict=True)
    adapters = [BakedAdapter(file.stem, read_adapter(file), strength) for file, strength in pairs]
    print_lines(baked(base_path(base), out, adapters, undo, force))
    written = out.rglob("*") if out.is_dir() else [out]
    print(f"wrote {out}: {format_bytes(sum(file.stat().st_size for file in written if file.is_file()))}")


def check_method_options(method: str, density: float | None, seed: int | None) -> None:
    """Raises `Refused` if an option is set that the merge method ignores."""
    if density is not None and method in ("linear", "svd"):
        raise Refused(f"--density {density:g}: {method} keeps all values; use --method ties, dare or dare_ties")
    if seed is not None and not method.startswith("dare"):
        raise Refused(f"--seed {seed}: {method} uses no random numbers; use --method dare or dare_ties")


def one_per_file(values: list[str] | None, files: tuple[Path, ...], flag: str) -> list[float]:
    """Parse one finite number per file, separated by spaces or commas. Raises `Refused` if the counts differ."""
    if not values:
        return [1.0] * len(files)
    try:
        numbers = [float(part) for part in ",".join(values).split(",")]
    except ValueError:
        raise Refused(f"{flag} {' '.join(values)}: must be numbers, such as 0.7 0.5") from None
    if len(numbers) != len(files):
        raise Refused(f"{flag}: got {len(numbers)} numbers for {len(files)} files; use one number per file")
    for number in numbers:
        if not math.isfinite(number):
            raise Refused(f"{flag} {number:g}: must be a finite number")
    return numbers


def block_factors(values: list[str], num_files: int) -> list[dict[str, float]]:
    """Parse block factors, separated by spaces or commas, into a table of factors for each file.

    `up_blocks.1=0.5` applies to all files; `2:text=0` applies to the second and overrides the former. Raises `Refused`
    if one is invalid or given twice.
    """
    factors: dict[tuple[int, str], float] = {}  # by file number (0 for all) and block
    for one in ",".join(values).split(",") if values else []:
        number, colon, rest = one.strip().rpartition(":")
        block, _, text = rest.partition("=")
        try:
            file, factor = int(number) if colon else 0, float(text)
        except ValueError:
            file, factor = -1, 0.0
        if not bool(colon) <= file <= num_files or not math.isfinite(factor):
            raise Refused(f"--blocks {one}: must be BLOCK=FACTOR, or N:BLOCK=FACTOR with N from 1 to {num_files}")
        if (file, block) in factors:
            raise Refused(f"--blocks {one}: {block} is already set to {factors[file, block]:g}; set it once")
        factors[file, block] = factor
    tables = ({block: factor for (file, block), factor in factors.items() if file == n} for n in range(num_files + 1))
    for_all, *own = tables
    return [for_all | table for table in own]


def base_path(base: str) -> Path:
    """Return the path of a base on disk. Names that are not paths (sketch, hub ids) are resolved."""
    if Path(base).exists() and base != "sketch":
        return Path(base)
    from scumble.configs.options import Model

    from ..base_model.detect import detect_base

    return Path(detect_base(Model(base=base)).path)


def print_lines(lines: list[str]) -> None:
    for line in lines:
        print(line)


def _format_blocks(blocks: dict[str, float]) -> str:
    return f" {blocks}".replace("'", "") if blocks else ""
