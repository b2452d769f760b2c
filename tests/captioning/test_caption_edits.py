"""Edits to the captions of a folder: what they change, that no other byte changes, and that undo restores all."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from scumble.captioning import edits
from scumble.configs.errors import Refused
from scumble.trainer import cli

TEXTS = {
    "a.txt": b"zwx style, red cat, sitting, Red Cat\n",
    "b.txt": "\ufeffzwx style, cät, category, ^_^\r\nanother line, cat\r\n".encode(),
    "c.caption": b"  A cat, sitting on a mat. It is red, and happy.",
    "d.txt": b"",
    "e.txt": "zwx style, caf\u00e9 cat".encode("utf-16"),
    "deep/f.txt": b"zwx style,cat ,  dog\n\n",
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "my photos"
    for name, text in TEXTS.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text)
        Image.new("RGB", (8, 8)).save(file.with_suffix(".png"))
    Image.new("RGB", (8, 8)).save(folder / "g.png")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".txt", ".caption")
    }


def scumble(*words: str | Path) -> None:
    cli.main([str(word) for word in words])


@pytest.mark.parametrize(
    ("old", "new", "caption", "expected"),
    [
        ("cat", "dog", "cat, category, a cat.", "dog, category, a dog."),
        ("cat", "", "a cat, sitting", "a, sitting"),
        ("red cat", "", "zwx, red cat, sitting", "zwx, sitting"),
        ("red cat", "", "red cat, sitting", "sitting"),
        ("red cat", "", "sitting, red cat", "sitting"),
        ("^_^", "smile", "a, ^_^, b", "a, smile, b"),
        ("a.c", "x", "abc a.c", "abc x"),
        ("cat", "\\1", "cat", "\\1"),
        ("Cat", "dog", "cat", "cat"),
    ],
)
def test_replace_finds_whole_words_and_cleans_up_around_them(old: str, new: str, caption: str, expected: str):
    assert edits.replacing(edits.pattern(old, False, False, ""), new, False)(caption) == expected


def test_replace_with_a_regex_equals_re_sub():
    for old, new, caption in (
        (r"(\w+) cat", r"\1 dog", "red cat, blue cat"),
        (r"\bcat(?=,|$)", "dog", "cat, cats, cat"),
    ):
        assert edits.replacing(edits.pattern(old, True, False, ""), new, True)(caption) == re.sub(old, new, caption)
    with pytest.raises(Refused, match="not a valid regex"):
        edits.pattern("(", True, False, "replace")
    with pytest.raises(Refused, match="invalid group reference"):
        edits.replacing(edits.pattern("cat", True, False, ""), r"\2", True)


def test_words_are_added_at_either_end_unless_the_caption_has_them():
    assert edits.adding("cat", "front")("category, a dog") == "cat, category, a dog"
    assert edits.adding("cat", "end")("a dog,") == "a dog, cat"
    assert edits.adding("cat", "end")("a Cat, a dog") == edits.adding("cat", "front")("a Cat, a dog") == "a Cat, a dog"


def test_tags_are_removed_whole_deduplicated_and_sorted():
    caption = "zwx, Red Cat, cat, sitting, red cat"
    assert edits.removing(["red cat", "none"], False)(caption) == "zwx, cat, sitting"
    assert edits.removing([r".*cat"], True)(caption) == "zwx, sitting"
    assert edits.deduped(caption) == "zwx, Red Cat, cat, sitting"
    assert edits.sorting(None, 1)(caption) == "zwx, cat, Red Cat, red cat, sitting"
    counts = edits.tag_counts(["cat, sitting", "cat, mat", "cat, Sitting"])
    assert counts == {"cat": 3, "sitting": 2, "mat": 1}
    assert edits.sorting(counts, 0)("mat, sitting, cat") == "cat, sitting, mat"
    for edit in (edits.removing(["none"], False), edits.deduped, edits.sorting(None, 9)):
        assert edit("a ,b;  c") == "a ,b;  c"  # nothing to do: unchanged


def test_an_edit_changes_only_the_affected_lines_and_no_other_byte(photos: Path, capsys: pytest.CaptureFixture[str]):
    scumble("captions", "replace", photos, "sitting", "asleep")
    assert files(photos) == TEXTS | {
        "a.txt": b"zwx style, red cat, asleep, Red Cat\n",
        "c.caption": b"A cat, asleep on a mat. It is red, and happy.",
    }
    output = capsys.readouterr().out
    assert "a.txt\n  - zwx style, red cat, sitting, Red Cat\n  + zwx style, red cat, asleep, Red Cat\n" in output
    assert "changed 2 caption files; to undo: `scumble captions undo '" in output
    scumble("captions", "add", photos, "by the sea", "--only", "^another")
    assert files(photos)["b.txt"] == TEXTS["b.txt"]  # --only searches the whole text, not each line
    scumble("captions", "add", photos, "by the sea", "--only", "another")
    changed = "zwx style, cät, category, ^_^, by the sea\r\nanother line, cat, by the sea\r\n"
    assert files(photos)["b.txt"] == changed.encode()
    scumble("captions", "replace", photos, "café", "tea room")
    assert files(photos)["e.txt"].decode() == "zwx style, tea room cat"


def test_a_dry_run_shows_the_differences_and_writes_nothing(photos: Path, capsys: pytest.CaptureFixture[str]):
    before = sorted(photos.rglob("*"))
    scumble("captions", "remove", photos, "zwx style", "--dry-run")
    output = capsys.readouterr().out
    assert "  - zwx style,cat ,  dog\n  + cat, dog\n" in output and "would change 4 caption files (--dry-run)" in output
    assert files(photos) == TEXTS and sorted(photos.rglob("*")) == before


def test_undo_reverts_one_change_after_another_byte_for_byte(photos: Path, capsys: pytest.CaptureFixture[str]):
    states = [files(photos)]
    for command in (
        ["replace", "cat", "dog"], ["add", "at night"], ["remove", "at night", "Red Cat"], ["sort", "--by", "alphabet"],
        ["replace", "--regex", r"\w+", "x"], ["dedupe"],
    ):  # fmt: skip
        scumble("captions", command[0], photos, *command[1:])
        states.append(files(photos))
    assert len({str(state) for state in states}) == 7
    capsys.readouterr()
    for state in reversed(states[:-1]):
        scumble("captions", "undo", photos)
        assert files(photos) == state
    assert "undone: captions replace cat dog (5 files)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        scumble("captions", "undo", photos)
    assert stop.value.code == 2 and "no caption changes to undo" in capsys.readouterr().err


def test_undo_works_from_any_folder_of_the_image_set(photos: Path):
    scumble("captions", "replace", photos, "zwx style", "abc")
    scumble("captions", "replace", photos / "deep", "dog", "wolf")
    scumble("captions", "undo", photos)
    assert files(photos)["deep/f.txt"] == b"abc,cat, dog\n\n"
    shutil.move(photos / "deep", photos.parent / "moved")
    scumble("captions", "undo", photos.parent / "moved")
    assert (photos.parent / "moved/f.txt").read_bytes() == TEXTS["deep/f.txt"]
    assert files(photos)["a.txt"].startswith(b"abc, ")


def test_undo_refuses_to_discard_later_edits(photos: Path, capsys: pytest.CaptureFixture[str]):
    scumble("captions", "replace", photos, "cat", "dog")
    (photos / "a.txt").write_bytes(b"mine")
    state = files(photos)
    with pytest.raises(SystemExit):
        scumble("captions", "undo", photos)
    assert "a.txt: edited after `captions replace cat dog`; --overwrite undoes it anyway" in capsys.readouterr().err
    assert files(photos) == state
    scumble("captions", "undo", photos, "--overwrite")
    assert files(photos) == TEXTS


def test_undo_restores_invalid_utf8_and_an_interrupted_change(tmp_path: Path):
    from scumble.captioning.changes import Change, undo

    arbitrary_bytes = bytes(range(256)) + "\U0001f600\ud7ff".encode()
    (tmp_path / "a.txt").write_bytes(arbitrary_bytes)
    change = Change("first")
    change.write_bytes(tmp_path / "a.txt", b"new")
    change.write_bytes(tmp_path / "b.txt", b"new")
    log = next((tmp_path / ".scumble/captions").glob("*.jsonl"))
    with log.open("ab") as file:  # killed after logging c.txt but before writing it, and while logging the next file
        file.write(json.dumps({"file": "c.txt", "before": None, "after": "0" * 64}).encode() + b'\n{"file": "d.t')
    assert undo([tmp_path], overwrite=False)[0] == "first"
    assert files(tmp_path) == {"a.txt": arbitrary_bytes}


def test_a_killed_process_leaves_whole_files_and_can_be_undone(tmp_path: Path):
    for number in range(60):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number:02}.png")
        (tmp_path / f"{number:02}.txt").write_text("cat " * 200)
    before = files(tmp_path)
    script = f"""
import os, sys
from scumble.captioning import changes
from scumble.trainer import cli
writes, replace_file = [], changes.replace_file
def killed_while_writing(file, data):
    writes.append(file)
    if len(writes) == 31:
        file.with_name(".part").write_bytes(data[:10])
        os._exit(9)
    replace_file(file, data)
changes.replace_file = killed_while_writing
cli.main(["captions", "replace", {str(tmp_path)!r}, "cat", "dog", "--show", "0"])
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    current = files(tmp_path)
    assert sorted(set(current.values())) == [b"cat " * 200, (b"dog " * 200).strip()] and len(current) == 60
    scumble("captions", "undo", tmp_path)
    assert files(tmp_path) == before


def test_symlinks_and_permissions_of_caption_files_are_kept(photos: Path, tmp_path: Path):
    (photos / "a.txt").chmod(0o640)
    target = tmp_path / "shared.txt"
    target.write_text("a cat")
    (photos / "g.txt").symlink_to(target)
    scumble("captions", "replace", photos, "cat", "dog")
    assert (photos / "g.txt").is_symlink() and target.read_text() == "a dog"
    assert (photos / "a.txt").stat().st_mode & 0o777 == 0o640
    scumble("captions", "undo", photos)
    assert (photos / "g.txt").is_symlink() and target.read_text() == "a cat"


def test_an_unwritable_folder_is_refused_in_one_line(photos: Path, capsys: pytest.CaptureFixture[str]):
    (photos / ".scumble").write_text("a file in place of the folder")
    with pytest.raises(SystemExit) as stop:
        scumble("captions", "replace", photos, "cat", "dog")
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 73 and ": cannot be written" in line and len(line.splitlines()) == 1
    assert files(photos)["a.txt"] == TEXTS["a.txt"]


def rows(output: str) -> Iterator[list[str]]:
    return (line.split() for line in output.splitlines())


def test_list_counts_tags_and_words(photos: Path, capsys: pytest.CaptureFixture[str]):
    scumble("captions", "list", photos)
    output = capsys.readouterr().out
    assert "7 images; captions: 5 manual, 2 missing" in output
    assert ["4", "80%", "zwx", "style"] in [[*row[:2], *row[3:]] for row in rows(output) if len(row) > 4]
    scumble("captions", "list", photos, "--words", "--top", "1")
    output = capsys.readouterr().out
    assert ["5", "100%", "cat"] in [[*row[:2], *row[3:]] for row in rows(output) if len(row) == 4]


def test_list_shows_training_prompts_with_clip_token_counts(photos: Path, capsys: pytest.CaptureFixture[str]):
    (photos / "a.txt").write_text("a photo of a {cat|cat}")
    (photos / "b.txt").write_text("cat " * 80)
    rules = ["--trigger", "zwx", "--caption-prefix", "see", "--caption-dropout", "1"]
    scumble("captions", "list", photos, "--training", "2", *rules)
    output = capsys.readouterr().out
    assert output.count("see zwx, a photo of a cat") == 2
    assert "the text encoder reads 75 tokens; 2 longer prompts truncated" in output
    scumble("captions", "list", photos, "--json")
    found = {Path(one["image"]).name: one for one in json.loads(capsys.readouterr().out)["captions"]}
    assert found["a.png"]["training"] == [{"caption": "a photo of a cat", "tokens": 5}]  # 320 1125 539 320 2368
    assert found["b.png"]["training"][0]["tokens"] == 80 and found["g.png"]["source"] == "none"


def test_captions_from_a_table_are_edited_in_separate_files_and_a_list_of_folders_works(tmp_path: Path):
    for name in ("one/a.png", "one/b.png", "two/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "one/metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "a cat"}\n{"file_name": "b.png", "text": "a dog"}\n'
    )
    (tmp_path / "two/c.txt").write_text("a cat")
    table = (tmp_path / "one/metadata.jsonl").read_bytes()
    folders = tmp_path / "set.toml"
    folders.write_text('[[folders]]\npath = "one"\n[[folders]]\npath = "two"\nrepeats = 2\n')
    scumble("captions", "replace", folders, "cat", "fox")
    assert files(tmp_path) == {"one/a.txt": b"a fox\n", "two/c.txt": b"a fox"}
    assert (tmp_path / "one/metadata.jsonl").read_bytes() == table
    scumble("captions", "undo", folders)
    assert files(tmp_path) == {"two/c.txt": b"a cat"}


def test_an_unreadable_caption_is_reported_and_left_unchanged(photos: Path, capsys: pytest.CaptureFixture[str]):
    broken = "ein Bär".encode("latin-1")
    (photos / "a.txt").write_bytes(broken)
    for command in (["list", str(photos)], ["replace", str(photos), "cat", "dog"]):
        scumble("captions", *command)
        assert "a.txt is not UTF-8: save it as UTF-8 or delete it" in capsys.readouterr().err
    assert files(photos)["a.txt"] == broken
