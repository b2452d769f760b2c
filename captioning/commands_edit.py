"""`scumble captions …`: the captions of a folder looked at, edited, taken back."""

import json as json_library
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from scumble.configs.errors import Refused
from scumble.configs.options import Captions, section
from scumble.datasets.captions import caption_at_step, with_folder_rules

from . import edits

captions = App(name="captions", help="Look at the captions of a folder, and edit all of them.", help_format="plaintext")

DEFAULTS = Captions()
Folder = Annotated[Path, Parameter(help="Folder of pictures, or a TOML list of folders")]
Only = Annotated[str, Parameter(help="Only captions in which this regex finds something")]
DryRun = Annotated[bool, Parameter(help="Show what would be changed, and change nothing", negative="")]
Show = Annotated[int, Parameter(help="Changed files that are shown")]
Regex = Annotated[bool, Parameter(help="The words are a regex", negative="")]
Overwrite = Annotated[bool, Parameter(help="Take it back though a file was changed since by other means", negative="")]


@captions.command(name="list")
def list_captions(
    source: Folder,
    /,
    *,
    rules: Annotated[Captions, section("What training hears")] = DEFAULTS,
    heard: Annotated[
        int, Parameter(help="Show what training hears of each caption in so many steps, and its tokens")
    ] = 0,
    words: Annotated[bool, Parameter(help="Count words, not tags between commas", negative="")] = False,
    top: Annotated[int, Parameter(help="Tags that are shown")] = 30,
    only: Only = "",
    json: Annotated[bool, Parameter(help="Print one JSON object, for programs", negative="")] = False,
) -> None:
    """Count the tags of the captions, and show what training will hear of them."""
    from .tables import count_table, table_headline, training_table
    from .texts import read_texts
    from .tokens import WINDOW, num_tokens

    looked_for = _pattern(only)
    found, whole_set = read_texts(source)
    _warn([str(one) for one in whole_set.left_out if one.is_image])
    texts = [text for text in found if not looked_for or any(map(looked_for.search, text.lines))]
    spoken = [" ".join(text.lines) for text in texts if text.lines]
    counts = edits.word_counts(spoken) if words else edits.tag_counts(spoken)
    rows = [
        (
            text.picture,
            caption_at_step(text.example.lines, _audible(rules, text.example.rules), seed=0, step=step, index=index),
        )
        for index, text in enumerate(texts)
        for step in range(max(heard, 1 if json else 0))
    ]
    tokens = num_tokens([words for _, words in rows])
    if json:
        steps = max(heard, 1)
        told = [
            {
                "picture": str(text.picture), "file": str(text.stands_in or text.file), "by": text.source,
                "lines": text.lines,
                "heard": [
                    {"caption": rows[at][1], "tokens": tokens[at]} for at in range(index * steps, (index + 1) * steps)
                ],
            }
            for index, text in enumerate(texts)
        ]  # fmt: skip
        print(json_library.dumps({"counts": dict(counts.most_common()), "captions": told}, ensure_ascii=False))
        return
    _print(table_headline(texts))
    if heard:
        _print(training_table([(*row, count) for row, count in zip(rows, tokens, strict=True)], WINDOW))
    else:
        _print(count_table(counts, len(spoken), top, "words" if words else "tags"))


@captions.command
def replace(
    source: Folder,
    old: Annotated[str, Parameter(help="Words to look for, as whole words")],
    new: Annotated[str, Parameter(help="What stands there then; empty: nothing")],
    /,
    *,
    regex: Regex = False,
    ignore_case: Annotated[bool, Parameter(help="Find them in small and capital letters", negative="")] = False,
    only: Only = "",
    dry_run: DryRun = False,
    show: Show = 20,
) -> None:
    """Replace words in all captions."""
    if not old:
        raise Refused("captions replace: name the words to look for")
    edit = edits.replacing(edits.pattern(old, regex, ignore_case, "replace"), new, regex)
    _edit(source, edit, only, dry_run, show, ["replace", old, new])


@captions.command
def add(
    source: Folder,
    words: Annotated[str, Parameter(help="Words or tags to add")],
    /,
    *,
    position: Annotated[Literal["front", "end"], Parameter(help="Where the words are added")] = "end",
    only: Only = "",
    dry_run: DryRun = False,
    show: Show = 20,
) -> None:
    """Add words to every caption that has them not."""
    if not words.strip():
        raise Refused("captions add: name the words to add")
    _edit(source, edits.adding(words.strip(), position), only, dry_run, show, ["add", words])


@captions.command
def remove(
    source: Folder,
    /,
    *tags: Annotated[str, Parameter(name="TAGS", help="Tags to take out, whole and whatever their case")],
    regex: Regex = False,
    only: Only = "",
    dry_run: DryRun = False,
    show: Show = 20,
) -> None:
    """Take whole tags out of all captions; words inside sentences are for `replace`."""
    if not tags:
        raise Refused("captions remove: name the tags to take out")
    _edit(source, edits.removing(tags, regex), only, dry_run, show, ["remove", *tags])


@captions.command
def dedupe(source: Folder, /, *, only: Only = "", dry_run: DryRun = False, show: Show = 20) -> None:
    """Leave each tag of a caption once, where it stands first."""
    _edit(source, edits.deduped, only, dry_run, show, ["dedupe"])


@captions.command
def sort(
    source: Folder,
    /,
    *,
    by: Annotated[Literal["count", "alphabet"], Parameter(help="count: the most frequent of the set first")] = "count",
    keep_tags: Annotated[int, Parameter(help="Tags at the front that stay where they are")] = 1,
    only: Only = "",
    dry_run: DryRun = False,
    show: Show = 20,
) -> None:
    """Put the tags of each caption in order."""
    from .texts import read_texts

    texts, _ = read_texts(source)
    counts = edits.tag_counts([line for text in texts for line in text.lines]) if by == "count" else None
    _edit(source, edits.sorting(counts, max(0, keep_tags)), only, dry_run, show, ["sort", "by", by])


@captions.command
def undo(source: Folder, /, *, overwrite: Overwrite = False) -> None:
    """Take back the latest change of captions, byte for byte; again for the one before."""
    take_back(source, overwrite)


def take_back(source: Path, overwrite: bool) -> None:
    """Undo the latest change and tell what it was."""
    from .changes import undo as taken_back
    from .texts import read_texts

    roots = [source] if source.is_dir() else sorted({text.file.parent for text in read_texts(source)[0]})
    what, files = taken_back(roots, overwrite)
    print(f"took back: {what} ({len(files)} file{'s' * (len(files) != 1)})")


def _audible(rules: Captions, own: Iterable[tuple[str, Any]]) -> Captions:
    """The rules for one picture, but for those steps in which nothing is heard: every caption is to be seen."""
    return with_folder_rules(rules, own).model_copy(update={"caption_dropout": 0.0})


def _pattern(only: str) -> re.Pattern[str] | None:
    return edits.pattern(only, True, False, "--only") if only else None


def _edit(source: Path, edit: edits.Edit, only: str, dry_run: bool, show: int, words: Sequence[str]) -> None:
    from .editing import edited, write
    from .texts import check_writable, read_texts

    looked_for = _pattern(only)
    texts, found = read_texts(source)
    check_writable(texts)
    _warn([str(one) for one in found.left_out if one.is_image])
    changes = edited(texts, edit, looked_for)
    if not changes:
        print("nothing to change")
        return
    from .tables import diff_table

    _print(diff_table(changes, source, max(0, show)))
    count = f"{len(changes)} caption file{'s' * (len(changes) != 1)}"
    if dry_run:
        print(f"would change {count} (--dry-run)")
        return
    write(changes, "captions " + shlex.join(words))
    print(f"changed {count}; `scumble captions undo {shlex.quote(str(source))}` takes it back")


def _warn(lost: Sequence[str]) -> None:
    """Name pictures that a set loses, as those whose captions cannot be read."""
    for one in lost[:10]:
        print(f"left out: {one}", file=sys.stderr)
    if len(lost) > 10:
        print(f"and {len(lost) - 10} more left out", file=sys.stderr)


def _print(page: object) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=not sys.stdout.isatty()).print(page)
