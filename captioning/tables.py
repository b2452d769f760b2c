"""Terminal tables of captions: tag counts, training prompts, and differences."""

from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from scumble.configs.words import counted
from scumble.datasets.captions import tags_of

from .editing import EditedFile
from .texts import CaptionEntry, CaptionSource

SOURCES: dict[CaptionSource, str] = {
    "manual": "manual",
    "generated": "generated",
    "table": "from a table",
    "class words": "class words only",
    "none": "missing",
}


def headline(entries: Sequence[CaptionEntry]) -> str:
    """`24 images; captions: 20 manual, 3 generated, 1 missing`."""
    counts = Counter(entry.source for entry in entries)
    parts = ", ".join(f"{counts[source]} {label}" for source, label in SOURCES.items() if counts[source])
    return f"{counted(len(entries), 'image')}; captions: {parts}"


def count_table(counts: Counter[str], num_captions: int, top: int, what: str) -> RenderableType:
    """The most frequent tags or words, with the number and share of the captions that contain them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("captions", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    table.add_column(what)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    for tag, count in ordered[:top]:
        share = count / max(1, num_captions)
        table.add_row(str(count), f"{share:.0%}", Text("▇" * max(1, round(share * 12)), "cyan"), Text(tag))
    once = sum(count == 1 for count in counts.values())
    summary = f"{len(counts)} distinct {what}, {once} in only one caption"
    if len(counts) > top:
        summary += f"; --top {len(counts)} shows all"
    return Group(table, Text(summary, "dim"))


def training_table(rows: Sequence[tuple[Path, str, int]], window: int) -> RenderableType:
    """Image, training prompt, and number of tokens; counts above the text encoder's window are marked."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("image", overflow="fold", max_width=32)
    table.add_column("tokens", justify="right")
    table.add_column("training prompt", overflow="fold")
    previous = None
    for image, prompt, tokens in rows:
        table.add_row(
            "" if image == previous else image.name,
            Text(str(tokens), "bold red" if tokens > window else ""),
            Text(prompt) if prompt else Text("(empty)", "dim"),
        )
        previous = image
    num_long = sum(tokens > window for _, _, tokens in rows)
    summary = f"the text encoder reads {window} tokens"
    if num_long:
        summary += f"; {counted(num_long, 'longer prompt')} truncated"
    return Group(table, Text(summary, "red" if num_long else "dim"))


def diff_table(changes: Sequence[EditedFile], root: Path, show: int) -> RenderableType:
    """The changed lines of each file, before (-) and after (+), with the differences in bold."""
    lines: list[Text] = []
    for one in changes[:show]:
        lines.append(Text(str(one.file.relative_to(root) if one.file.is_relative_to(root) else one.file), "bold"))
        for before, after in zip(one.before.splitlines(), one.after.splitlines(), strict=True):
            if before != after:
                lines += _diff_lines(before, after)
    if len(changes) > show:
        lines.append(Text(f"{len(changes) - show} more; --show {len(changes)} shows all", "dim"))
    return Group(*lines)


def _diff_lines(before: str, after: str) -> list[Text]:
    removed, added = Text("  - ", "red"), Text("  + ", "green")
    old, new = _parts(before), _parts(after)
    for kind, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        removed.append("".join(old[a:b]), "red" if kind == "equal" else "bold red")
        added.append("".join(new[c:d]), "green" if kind == "equal" else "bold green")
    return [removed, added]


def _parts(line: str) -> list[str]:
    """The tags of a line, or its words if it has no tags, each with the separator that follows it."""
    if len(tags_of(line)) > 2:
        return [part + "," for part in line.split(",")[:-1]] + [line.rsplit(",", 1)[-1]]
    return [word + " " for word in line.split(" ")[:-1]] + [line.rsplit(" ", 1)[-1]]
