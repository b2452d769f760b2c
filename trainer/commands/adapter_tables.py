"""Reports on adapter files as people and programs read them: rich tables, JSON."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from scumble.configs.errors import printable
from scumble.configs.words import counted

from ..adapters.inspect import FAMILY_LABELS, Report, beyond_diffusers, block_norms, block_of, poor_uis
from ..adapters.keys import ModulePath
from ..adapters.module import LABELS
from ..adapters.ui_keys import Match
from ..system.formatting import format_bytes

DIALECT_LABELS = {"kohya": "kohya's", "peft": "PEFT's (diffusers)"}
BAR_CELLS = 32  # at most; a narrow terminal has shorter bars
DORA_NOTE = "without DoRA's magnitudes, whose effect depends on the base"
MOST_FAULTS = 20
MOST_LISTED = 6  # ranks or alphas of one part
NAMED = 3  # modules named where many have the same trouble


def report_page(report: Report) -> RenderableType:
    """What an artist wants to know of a file first, then its numbers."""
    return Group(
        Text(""),
        _line(report.path, "bold"),
        _line(headline(report)),
        Text(""),
        _facts(report),
        Text(""),
        _parts(report),
        Text(""),
        _bars(report),
        *([_line(DORA_NOTE, "dim")] if "dora" in report.network else []),
        Text(""),
        ui_table(report.uis, beyond_diffusers(report.network)),
        *[_line(f"! {trouble}", "bold red") for trouble in troubles(report)],
    )


def headline(report: Report) -> str:
    """`LoRA for Stable Diffusion 1, 144 modules, 1.2 MB, float16`."""
    network = " + ".join(LABELS[name] for name in report.network.split("+"))
    count = sum(group.modules for group in report.groups)
    base = "sketch" if report.settings.get("base") == "sketch" else FAMILY_LABELS[report.family]
    return (
        f"{network} for {base}, {counted(count, 'module')}, {format_bytes(report.bytes)}, {' + '.join(report.dtypes)}"
    )


def troubles(report: Report) -> Iterator[str]:
    """What a person should know before using the file, a line each."""
    if report.broken:
        yield f"{counted(len(report.broken), 'module')} with numbers that are not finite: {_named(report.broken)}"
    if report.zero:
        yield f"{counted(len(report.zero), 'module')} without effect, all zero: {_named(report.zero)}"
    if report.hashes.stored and report.hashes.stored != report.hashes.model:
        yield "the hash in its metadata is not that of its tensors: the file was changed after it was written"
    if report.paths:
        yield (
            f"its metadata tells paths of a disk ({', '.join(report.paths)}): `scumble adapter convert` makes a file "
            "without them"
        )
    poor = poor_uis(report.uis, report.network)
    if poor:
        yield not_whole(poor, report.dialect)


def as_json(report: Report) -> dict[str, Any]:
    """The same for programs; norms by module."""
    return {
        "path": report.path, "bytes": report.bytes, "family": report.family, "network": report.network,
        "dialect": report.dialect, "dtypes": report.dtypes,
        "parts": [
            {"part": group.label, "modules": group.modules, "ranks": group.ranks, "alphas": group.alphas}
            for group in report.groups
        ],
        "trigger": report.trigger, "tags": dict(report.tags), "settings": report.settings,
        "hashes": {
            "sha256": report.hashes.file, "auto_v2": report.hashes.auto_v2, "model": report.hashes.model,
            "a1111": report.hashes.a1111, "stored": report.hashes.stored,
            "stored_is_true": report.hashes.stored == report.hashes.model if report.hashes.stored else None,
        },
        "blocks": {label: norm for label, (norm, _) in block_norms(report.norms).items()},
        "norms": {str(place): norm for place, norm in report.norms.items()},
        "paths_in_metadata": report.paths,
        "zero": [str(place) for place in report.zero],
        "not_finite": [str(place) for place in report.broken],
        "uis": {
            match.ui: {"matched": match.matched, "total": match.total, "refusal": match.refusal}
            for match in report.uis
        },
    }  # fmt: skip


def ui_table(uis: Sequence[Match], beyond_diffusers: str) -> Table:
    """UI × matched/total, and what happens to the rest; diffusers is not blamed for a kind that it does not know."""
    table = _table("UI", "modules read", "")
    for match in uis:
        excused = match.ui == "diffusers" and beyond_diffusers
        style = "green" if match.is_whole else "dim" if excused else "red"
        table.add_row(match.ui, Text(f"{match.matched} / {match.total}", style), safe(excused or _verdict(match)))
    return table


def verdict_page(
    path: str, table: Table, trials: Sequence[str], untried: str, faults: Sequence[str], poor: str
) -> RenderableType:
    """Of `verify`: the UIs' shares, what the base computes, every fault, and the verdict in one line."""
    shown = [*faults[:MOST_FAULTS], *([f"and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else [])]
    lines = [_line(f"! {fault}", "bold red") for fault in [*shown, *([poor] if poor else [])]]
    told = [*trials, *([f"not tried in diffusers: {untried}"] if untried else [])]
    return Group(_line(path, "bold"), table, *map(_line, told), *(lines or [_line("nothing is wrong", "green")]))


def not_whole(poor: Sequence[str], dialect: str) -> str:
    """Which UIs do not read a file whole, and the cure where there is one."""
    cure = ": `scumble adapter convert` makes a file that is" if dialect == "peft" else ""
    return f"not read whole by {', '.join(poor)}{cure}"


def safe(text: str, most: int = 400) -> Text:
    """Text of a stranger's file: no markup, no control characters, not endless."""
    shown = printable(text)
    return Text(shown if len(shown) <= most else shown[: most - 1] + "…")


def _verdict(match: Match) -> str:
    if match.refusal:
        return f"turns the file away: {match.refusal}"
    if match.lost:
        more = f" and {len(match.lost) - 1} more" if len(match.lost) > 1 else ""
        return f"passes over {match.lost[0]}{more}"
    return "reads all of it"


def _facts(report: Report) -> Table:
    hashes = report.hashes
    told = {"": "none in the metadata", hashes.model: "the metadata's is true"}
    facts = {
        "trigger": report.trigger or "none told",
        "tags": ", ".join(f"{tag} ({count})" for tag, count in report.tags) or "none told",
        **report.settings,
        "keys": DIALECT_LABELS[report.dialect],
        "hash (A1111)": f"{hashes.a1111}  ({told.get(hashes.stored, 'the metadata tells another')})",
        "hash (AutoV2)": hashes.auto_v2,
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for label, value in facts.items():
        table.add_row(label, safe(value))
    return table


def _parts(report: Report) -> Table:
    table = _table("part", "modules", "rank", "alpha")
    for group in report.groups:
        ranks = [str(rank) if rank else "whole" for rank in group.ranks]
        alphas = ["none (scale 1)" if alpha is None else f"{alpha:g}" for alpha in group.alphas]
        table.add_row(group.label, str(group.modules), _list(ranks), _list(alphas))
    return table


def _list(rising: Sequence[str]) -> str:
    """All of a few, else the first and the last."""
    return ", ".join(rising) if len(rising) <= MOST_LISTED else f"{rising[0]} to {rising[-1]} ({len(rising)} different)"


def _bars(report: Report) -> Table:
    """Where the adapter works: the norm of each block's deltas together."""
    blocks = block_norms(report.norms)
    largest = max((norm for norm, _ in blocks.values()), default=0.0) or 1.0
    names = {block_of(place): place.block for place in report.norms}  # as `merge --blocks` takes them
    table = _table("block", "--blocks", "modules", "strength", "")
    table.columns[3].justify = "right"
    table.columns[4].max_width = BAR_CELLS
    for label, (norm, count) in blocks.items():
        strength = f"{norm:.3g}" if norm < 1000 else f"{norm:,.0f}"
        table.add_row(label, names[label], str(count), strength, Bar(largest, 0, norm, color="dark_orange"))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if column == "modules" else "left", no_wrap=number == 0)
    return table


def _line(text: str, style: str = "") -> Text:
    line = safe(text)
    line.stylize(style)
    return line


def _named(places: Sequence[ModulePath]) -> str:
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return ", ".join(map(str, places[:NAMED])) + more
