"""The findings of a check-up as terminal output, as one line each, and as JSON."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scumble.datasets.checkup.checkup import OF_FILES, Checkup, verdict

MAX_NAMED = 3  # images named per finding
COLORS = {"serious": "bold red", "warning": "yellow", "note": "dim"}


def print_findings(done: Checkup, name: str, base: str, written: list[Path]) -> None:
    """Print the findings, serious ones first, each with why it matters and what to do."""
    console = Console(highlight=False, markup=False)
    facts = done.facts
    sizes = facts.smallest if facts.smallest == facts.largest else f"{facts.smallest} to {facts.largest}"
    buckets = ", ".join(f"{use.width}x{use.height} ({use.images})" for use in facts.buckets[:6])
    console.print(
        f"{name}: {facts.images} images of {sizes}, {facts.captions} with captions, {facts.variety} variety",
        soft_wrap=True,
    )
    console.print(f"buckets for {base}: {buckets}", soft_wrap=True)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for one in done.findings:
        cell = Text(one.what, "" if one.severity == "note" else "bold")
        cell.append(f"\n{one.why}; {one.cure}", "not bold dim")
        num_named = len(one.details) if one.check in OF_FILES else MAX_NAMED
        for path, text in list(one.details.items())[:num_named]:
            cell.append(f"\n  {Path(path).name}: {text}", "not bold")
        if len(one.details) > num_named:
            cell.append(f"\n  and {len(one.details) - num_named} more", "not bold")
        table.add_row(Text(one.severity, COLORS[one.severity]), cell)
    console.print(table)
    console.print(Text(verdict(done), COLORS[done.findings[0].severity] if done.findings else "green"))
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)


def describe_findings(done: Checkup) -> str:
    """One line per serious finding or warning, serious ones first; empty if there are none."""
    grave = [one for one in done.findings if one.severity != "note"]
    lines = [f"  {one.severity}: {one.what}" for one in grave]
    return "\n".join([*lines, "  run `scumble check` for details and fixes"] if lines else [])


def as_json(done: Checkup) -> dict[str, Any]:
    """Facts and findings for programs; `images` of a finding maps image paths to details."""
    facts = asdict(done.facts) | {"variety": done.facts.variety}
    findings = [
        {
            "check": one.check, "severity": one.severity, "what": one.what, "why": one.why, "cure": one.cure,
            "images": one.details,
        }
        for one in done.findings
    ]  # fmt: skip
    return {"serious": done.is_serious, "facts": facts, "findings": findings}
