"""`scumble captions …`: show, edit and undo the captions of a folder."""

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
from scumble.configs.words import counted
from scumble.datasets.captions import caption_at_step, with_folder_rules

from . import edits

captions = App(name="captions", help="Show and edit the captions of a folder.", help_format="plaintext")

DEFAULTS = Captions()
Folder = Annotated[Path, Parameter(help="Folder of images, or a TOML list of folders")]
Only = Annotated[str, Parameter(help="Only captions that match this regex")]
DryRun = Annotated[bool, Parameter(help="Show the changes without writing them", negative="")]
Show = Annotated[int, Parameter(help="Number of changed files to show")]
Regex = Annotated[bool, Parameter(help="Treat the search text as a regex", negative="")]
Overwrite = Annotated[bool, Parameter(help="Undo even if files were edited after the change", negative="")]


@captions.command(name="list")
def list_captions(
    source: Folder,
    /,
    *,
    rules: Annotated[Captions, section("Training prompts")] = DEFAULTS,
    training: Annotated[
        int, Parameter(help="Show the training prompts of each caption for this many steps, with token counts")
    ] = 0,
    words: Annotated[bool, Parameter(help="Count words instead of comma-separated tags", negative="")] = False,
    top: Annotated[int, Parameter(help="Number of tags to show")] = 30,
    only: Only = "",
    json: Annotated[bool, Parameter(help="Print one JSON object, for programs", negative="")] = False,
) -> None:
    """Count the tags of the captions, or show the training prompts made from them."""
    from .tables import count_table, headline, training_table
    from .texts import read_captions
    from .tokens import WINDOW, num_tokens

    regex = _compile(only)
    found, image_set = read_captions(source)
    _warn([str(one) for one in image_set.left_out if one.is_image])
    entries = [entry for entry in found if not regex or any(map(regex.search, entry.lines))]
    full_captions = [" ".join(entry.lines) for entry in entries if entry.lines]
    counts = edits.word_counts(full_captions) if words else edits.tag_counts(full_captions)
    steps = max(training, 1 if json else 0)
    rows = [
        (
            entry.image,
            caption_at_step(
                entry.example.lines, _without_dropout(rules, entry.example.rules), seed=0, step=step, index=index
            ),
        )
        for index, entry in enumerate(entries)
        for step in range(steps)
    ]
    tokens = num_tokens([prompt for _, prompt in rows])
    if json:
        shown = [
            {
                "image": str(entry.image), "file": str(entry.caption_file or entry.target_file),
                "source": entry.source, "lines": entry.lines,
                "training": [
                    {"caption": rows[row][1], "tokens": tokens[row]}
                    for row in range(index * steps, (index + 1) * steps)
                ],
            }
            for index, entry in enumerate(entries)
        ]  # fmt: skip
        print(json_library.dumps({"counts": dict(counts.most_common()), "captions": shown}, ensure_ascii=False))
        return
    _print(headline(entries))
    if training:
        _print(training_table([(*row, count) for row, count in zip(rows, tokens, strict=True)], WINDOW))
    else:
        _print(count_table(counts, len(full_captions), top, "words" if words else "tags"))


@captions.command
def replace(
    source: Folder,
    old: Annotated[str, Parameter(help="Text to search for, as whole words")],
    new: Annotated[str, Parameter(help="Replacement; empty: the text is removed")],
    /,
    *,
    regex: Regex = False,
    ignore_case: Annotated[bool, Parameter(help="Ignore case", negative="")] = False,
    only: Only = "",
    dry_run: DryRun = False,
    show: Show = 20,
) -> None:
    """Replace words in all captions."""
    if not old:
        raise Refused("captions replace: OLD is empty; give the text to search for")
    edit = edits.replacing(edits.pattern(old, regex, ignore_case, "captions replace"), new, regex)
    _edit(source, edit, only, dry_run, show, ["replace", old, new])


@captions.command
def add(
    source: Folder,
    words: Annotated[str, Parameter(help="Words or tags to add")],
    /,
    *,
    position: Annotated[Literal["front", "end"], Parameter(help="Where to add the words")] = "end",
    only: Only = "",
    dry_run: DryRun = False,
    show: Show = 20,
) -> None:
    """Add words to every caption that lacks them."""
    if not words.strip():
        raise Refused("captions add: WORDS is empty; give the words to add")
    _edit(source, edits.adding(words.strip(), position), only, dry_run, show, ["add", words])


@captions.command
def remove(
    source: Folder,
    /,
    *tags: Annotated[str, Parameter(name="TAGS", help="Whole tags to remove; case is ignored")],
    regex: Regex = False,
    only: Only = "",
    dry_run: DryRun = False,
    show: Show = 20,
) -> None:
    """Remove whole tags from all captions; to remove words inside sentences, use `replace`."""
    if not tags:
        raise Refused("captions remove: TAGS is empty; give the tags to remove")
    _edit(source, edits.removing(tags, regex), only, dry_run, show, ["remove", *tags])


@captions.command
def dedupe(source: Folder, /, *, only: Only = "", dry_run: DryRun = False, show: Show = 20) -> None:
    """Remove repeated tags from each caption; the first occurrence is kept."""
    _edit(source, edits.deduped, only, dry_run, show, ["dedupe"])


@captions.command
def sort(
    source: Folder,
    /,
    *,
    by: Annotated[Literal["count", "alphabet"], Parameter(help="count: most frequent tags first")] = "count",
    keep_tags: Annotated[int, Parameter(help="Number of tags at the front that keep their place")] = 1,
    only: Only = "",
    dry_run: DryRun = False,
    show: Show = 20,
) -> None:
    """Sort the tags of each caption."""
    from .texts import read_captions

    entries, _ = read_captions(source)
    counts = edits.tag_counts([line for entry in entries for line in entry.lines]) if by == "count" else None
    _edit(source, edits.sorting(counts, max(0, keep_tags)), only, dry_run, show, ["sort", "--by", by])


@captions.command
def undo(source: Folder, /, *, overwrite: Overwrite = False) -> None:
    """Undo the latest caption change, byte for byte; repeat to undo earlier changes."""
    undo_latest(source, overwrite)


def undo_latest(source: Path, overwrite: bool) -> None:
    """Undo the latest change and print which one it was."""
    from .changes import undo as undo_change
    from .texts import read_captions

    roots = [source] if source.is_dir() else sorted({entry.target_file.parent for entry in read_captions(source)[0]})
    command, files = undo_change(roots, overwrite)
    print(f"undone: {command} ({counted(len(files), 'file')})")


def _without_dropout(rules: Captions, own: Iterable[tuple[str, Any]]) -> Captions:
    """The rules for one image without caption dropout, so that no caption is shown empty."""
    return with_folder_rules(rules, own).model_copy(update={"caption_dropout": 0.0})


def _compile(only: str) -> re.Pattern[str] | None:
    return edits.pattern(only, True, False, "--only") if only else None


def _edit(source: Path, edit: edits.Edit, only: str, dry_run: bool, show: int, words: Sequence[str]) -> None:
    from .editing import edited, write
    from .texts import check_writable, read_captions

    regex = _compile(only)
    entries, image_set = read_captions(source)
    check_writable(entries)
    _warn([str(one) for one in image_set.left_out if one.is_image])
    changes = edited(entries, edit, regex)
    if not changes:
        print("nothing to change")
        return
    from .tables import diff_table

    _print(diff_table(changes, source, max(0, show)))
    count = counted(len(changes), "caption file")
    if dry_run:
        print(f"would change {count} (--dry-run)")
        return
    write(changes, "captions " + shlex.join(words))
    print(f"changed {count}; to undo: `scumble captions undo {shlex.quote(str(source))}`")


def _warn(skipped: Sequence[str]) -> None:
    """Print the images that are skipped, for example because their captions cannot be read."""
    for one in skipped[:10]:
        print(f"skipped: {one}", file=sys.stderr)
    if len(skipped) > 10:
        print(f"{len(skipped) - 10} more skipped", file=sys.stderr)


def _print(renderable: object) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=not sys.stdout.isatty()).print(renderable)
