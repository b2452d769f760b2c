"""Format reports on adapter files as rich tables or JSON."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from scumble.configs.errors import printable
from scumble.configs.words import counted

from ..adapters.inspect import FAMILY_LABELS, Report, block_norms, block_of, diffusers_limit, incomplete_uis
from ..adapters.keys import ModulePath
from ..adapters.module import LABELS
from ..adapters.ui_keys import Match
from ..system.formatting import format_bytes

DIALECT_LABELS = {"kohya": "kohya", "peft": "PEFT (diffusers)"}
BAR_WIDTH = 32  # maximum, in characters; bars shrink in narrow terminals
DORA_NOTE = "strength without DoRA magnitudes, whose effect depends on the base"
MAX_FAULTS = 20
MAX_LISTED = 6  # ranks or alphas of one part
MAX_NAMED = 3  # modules named in a warning


def report_page(report: Report) -> RenderableType:
    """Build the report page: a summary first, then the details."""
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
        ui_table(report.uis, diffusers_limit(report.network)),
        *[_line(f"! {warning}", "bold red") for warning in warning_lines(report)],
    )


def headline(report: Report) -> str:
    """`LoRA for Stable Diffusion 1, 144 modules, 1.2 MB, float16`."""
    network = " + ".join(LABELS[name] for name in report.network.split("+"))
    count = sum(group.modules for group in report.groups)
    base = "sketch" if report.settings.get("base") == "sketch" else FAMILY_LABELS[report.family]
    return (
        f"{network} for {base}, {counted(count, 'module')}, {format_bytes(report.bytes)}, {' + '.join(report.dtypes)}"
    )


def warning_lines(report: Report) -> Iterator[str]:
    """Yield one line for each problem to know about before using the file."""
    if report.broken:
        yield f"{counted(len(report.broken), 'module')} with non-finite values: {_named(report.broken)}"
    if report.zero:
        yield f"{counted(len(report.zero), 'module')} without effect (all zeros): {_named(report.zero)}"
    if report.hashes.stored and report.hashes.stored != report.hashes.model:
        yield "the hash in the metadata does not match the tensors: the file was modified after it was written"
    if report.paths:
        yield (
            f"the metadata contains file paths ({', '.join(report.paths)}); `scumble adapter convert` writes a file "
            "without them"
        )
    if incomplete := incomplete_uis(report.uis, report.network):
        yield describe_incomplete(incomplete, report.dialect)


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as a JSON object, with norms by module."""
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
        "norms": {str(layer): norm for layer, norm in report.norms.items()},
        "paths_in_metadata": report.paths,
        "zero": [str(layer) for layer in report.zero],
        "not_finite": [str(layer) for layer in report.broken],
        "uis": {
            match.ui: {"matched": match.matched, "total": match.total, "refusal": match.refusal}
            for match in report.uis
        },
    }  # fmt: skip


def ui_table(uis: Sequence[Match], limit: str) -> Table:
    """Build a table with a row for each UI: matched / total modules, and what happens to the rest.

    `limit` says why diffusers cannot apply this kind of adapter, or is empty.
    """
    table = _table("UI", "modules loaded", "")
    for match in uis:
        reason = limit if match.ui == "diffusers" else ""
        style = "green" if match.is_complete else "dim" if reason else "red"
        table.add_row(match.ui, Text(f"{match.matched} / {match.total}", style), safe(reason or _outcome(match)))
    return table


def verdict_page(
    path: str, table: Table, checks: Sequence[str], skip_reason: str, faults: Sequence[str], incomplete: str
) -> RenderableType:
    """Build the page of `verify`: UI table, output checks, and all faults or a line that there are none."""
    shown = [*faults[:MAX_FAULTS], *([f"and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else [])]
    fault_lines = [_line(f"! {fault}", "bold red") for fault in [*shown, *([incomplete] if incomplete else [])]]
    check_lines = [*checks, *([f"diffusers check skipped: {skip_reason}"] if skip_reason else [])]
    verdict = fault_lines or [_line("no problems found", "green")]
    return Group(_line(path, "bold"), table, *map(_line, check_lines), *verdict)


def describe_incomplete(uis: Sequence[str], dialect: str) -> str:
    """Return which UIs do not load all modules, and how to fix it if possible; empty if all do."""
    fix = "; `scumble adapter convert` writes a file that works" if dialect == "peft" else ""
    return f"not all modules are loaded by {', '.join(uis)}{fix}" if uis else ""


def safe(text: str, max_length: int = 400) -> Text:
    """Make untrusted text safe to print: no markup, no control characters, limited length."""
    shown = printable(text)
    return Text(shown if len(shown) <= max_length else shown[: max_length - 1] + "…")


def _outcome(match: Match) -> str:
    if match.refusal:
        return f"rejects the file: {match.refusal}"
    if match.ignored:
        more = f" and {len(match.ignored) - 1} more" if len(match.ignored) > 1 else ""
        return f"ignores {match.ignored[0]}{more}"
    return "loads all modules"


def _facts(report: Report) -> Table:
    hashes = report.hashes
    checked = {"": "none in the metadata", hashes.model: "matches the metadata"}
    facts = {
        "trigger": report.trigger or "not in the metadata",
        "tags": ", ".join(f"{tag} ({count})" for tag, count in report.tags) or "not in the metadata",
        **report.settings,
        "keys": DIALECT_LABELS[report.dialect],
        "hash (A1111)": f"{hashes.a1111}  ({checked.get(hashes.stored, 'does not match the metadata')})",
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
        ranks = [str(rank) if rank else "full" for rank in group.ranks]
        alphas = ["none (scale 1)" if alpha is None else f"{alpha:g}" for alpha in group.alphas]
        table.add_row(group.label, str(group.modules), _list(ranks), _list(alphas))
    return table


def _list(values: Sequence[str]) -> str:
    """List a few ascending values in full, many as a range."""
    return ", ".join(values) if len(values) <= MAX_LISTED else f"{values[0]} to {values[-1]} ({len(values)} values)"


def _bars(report: Report) -> Table:
    """Show the strength of each block: the norm of all its deltas."""
    blocks = block_norms(report.norms)
    largest = max((norm for norm, _ in blocks.values()), default=0.0) or 1.0
    names = {block_of(layer): layer.block for layer in report.norms}  # as in `merge --blocks`
    table = _table("block", "--blocks", "modules", "strength", "")
    table.columns[3].justify = "right"
    table.columns[4].max_width = BAR_WIDTH
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


def _named(layers: Sequence[ModulePath]) -> str:
    more = f" and {len(layers) - MAX_NAMED} more" if len(layers) > MAX_NAMED else ""
    return ", ".join(map(str, layers[:MAX_NAMED])) + more
