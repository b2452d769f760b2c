"""Captions as people read them in a terminal: counts of tags, what training hears, and differences."""

from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text as Line

from scumble.datasets.captions import tags_of

from .editing import Edited
from .texts import CaptionSource, Text

SOURCES: dict[CaptionSource, str] = {
    "hand": "by hand",
    "scumble": "by scumble",
    "table": "from a table",
    "words": "the folder's words only",
    "none": "none",
}


def table_headline(texts: Sequence[Text]) -> str:
    """`24 pictures; captions: 20 by hand, 3 by scumble, 1 none`."""
    counts = Counter(text.source for text in texts)
    told = ", ".join(f"{counts[source]} {label}" for source, label in SOURCES.items() if counts[source])
    return f"{len(texts)} picture{'s' * (len(texts) != 1)}; captions: {told}"


def count_table(counts: Counter[str], num_captions: int, top: int, what: str) -> RenderableType:
    """The most frequent tags, with their number and their share of the captions."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("captions", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    table.add_column(what)
    ordered = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    for tag, count in ordered[:top]:
        share = count / max(1, num_captions)
        table.add_row(str(count), f"{share:.0%}", Line("▇" * max(1, round(share * 12)), "cyan"), Line(tag))
    once = sum(count == 1 for count in counts.values())
    rest = f"{len(counts)} different {what}, {once} in one caption only"
    if len(counts) > top:
        rest += f"; --top {len(counts)} shows all"
    return Group(table, Line(rest, "dim"))


def training_table(rows: Sequence[tuple[Path, str, int]], window: int) -> RenderableType:
    """Picture, what is heard of its caption, and its tokens; those above the window are cut there."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("picture", overflow="fold", max_width=32)
    table.add_column("tokens", justify="right")
    table.add_column("training hears", overflow="fold")
    before = None
    for picture, said, tokens in rows:
        long = tokens > window
        table.add_row(
            "" if picture == before else picture.name,
            Line(str(tokens), "bold red" if long else ""),
            Line(said) if said else Line("(nothing)", "dim"),
        )
        before = picture
    cut = sum(tokens > window for _, _, tokens in rows)
    told = f"the text encoder reads {window} tokens" + (f"; {cut} of these are longer and are cut there" if cut else "")
    return Group(table, Line(told, "red" if cut else "dim"))


def diff_table(changes: Sequence[Edited], root: Path, show: int) -> RenderableType:
    """Each file with its lines before (-) and after (+), what differs in bold."""
    lines: list[Line] = []
    for one in changes[:show]:
        lines.append(Line(str(one.file.relative_to(root) if one.file.is_relative_to(root) else one.file), "bold"))
        old, new = one.before.splitlines(), one.after.splitlines()
        for was, is_now in zip(old, new, strict=True):
            if was != is_now:
                lines += _two(was, is_now)
    if len(changes) > show:
        lines.append(Line(f"and {len(changes) - show} more; --show {len(changes)} shows all", "dim"))
    return Group(*lines)


def _two(was: str, is_now: str) -> list[Line]:
    removed, added = Line("  - ", "red"), Line("  + ", "green")
    old, new = _parts(was), _parts(is_now)
    for kind, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        removed.append("".join(old[a:b]), "red" if kind == "equal" else "bold red")
        added.append("".join(new[c:d]), "green" if kind == "equal" else "bold green")
    return [removed, added]


def _parts(line: str) -> list[str]:
    """Tags, or words where there are no tags, each with what separates it from the next."""
    if len(tags_of(line)) > 2:
        return [part + "," for part in line.split(",")[:-1]] + [line.rsplit(",", 1)[-1]]
    return [word + " " for word in line.split(" ")[:-1]] + [line.rsplit(" ", 1)[-1]]
