"""A check-up in words: in the terminal, in a line for each finding, as JSON."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scumble.datasets.checkup.checkup import OF_FILES, Checkup, verdict

NAMED = 3  # pictures named at a finding
COLOURS = {"serious": "bold red", "warning": "yellow", "note": "dim"}


def print_findings(done: Checkup, name: str, base: str, written: list[Path]) -> None:
    """The findings for people, serious ones first, each with why it matters and what to do."""
    console = Console(highlight=False, markup=False)
    facts = done.facts
    sizes = facts.smallest if facts.smallest == facts.largest else f"{facts.smallest} to {facts.largest}"
    buckets = ", ".join(f"{use.width}x{use.height} ({use.images})" for use in facts.buckets[:6])
    console.print(
        f"{name}: {facts.images} pictures of {sizes}, {facts.captions} with captions, {facts.variety} variety",
        soft_wrap=True,
    )
    console.print(f"trained for {base} as {buckets}", soft_wrap=True)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for one in done.findings:
        said = Text(one.what, "" if one.severity == "note" else "bold")
        said.append(f"\n{one.why}; {one.cure}", "not bold dim")
        most = len(one.details) if one.check in OF_FILES else NAMED
        for path, text in list(one.details.items())[:most]:
            said.append(f"\n  {Path(path).name}: {text}", "not bold")
        if len(one.details) > most:
            said.append(f"\n  and {len(one.details) - most} more", "not bold")
        table.add_row(Text(one.severity, COLOURS[one.severity]), said)
    console.print(table)
    console.print(Text(verdict(done), COLOURS[done.findings[0].severity] if done.findings else "green"))
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)


def describe_findings(done: Checkup) -> str:
    """A line for each finding that is more than a note, serious ones first; empty where there is none."""
    grave = [one for one in done.findings if one.severity != "note"]
    lines = [f"  {one.severity}: {one.what}" for one in grave]
    return "\n".join([*lines, "  `scumble check` shows them, and what to do"] if lines else [])


def as_json(done: Checkup) -> dict[str, Any]:
    """Facts and findings for programs; `pictures` of a finding has what is to be said of each."""
    facts = asdict(done.facts) | {"variety": done.facts.variety}
    findings = [
        {
            "check": one.check, "severity": one.severity, "what": one.what, "why": one.why, "cure": one.cure,
            "images": one.details,
        }
        for one in done.findings
    ]  # fmt: skip
    return {"serious": done.is_serious, "facts": facts, "findings": findings}
