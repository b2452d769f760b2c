"""Atomic writes, progress bars, and the table of exit codes."""

import re
from pathlib import Path

import pytest
from paths import CHECKOUT

from scumble.configs import atomic
from scumble.configs.atomic import atomic_write, replace_folder, temporary_name
from scumble.configs.errors import Refused
from scumble.configs.exit_codes import EXIT_CODES
from scumble.configs.progress import progress_bar, tracked


def test_a_file_is_replaced_when_the_block_ends_and_its_folder_is_created(tmp_path: Path):
    path = tmp_path / "new" / "a.txt"
    for text in ("one", "two"):
        with atomic_write(path, sync=True) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


def test_a_failed_block_leaves_only_the_old_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_an_unwritable_path_is_refused_with_exit_code_73(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot be written") as refused, atomic_write(tmp_path / "file/a.txt") as path:
        path.write_text("x")
    assert refused.value.exit_code == 73


def test_temporary_names_are_unique_and_long_names_fit(tmp_path: Path):
    path = tmp_path / ("ü" * 125 + ".txt")
    assert temporary_name(path) != temporary_name(path)
    with atomic_write(path) as temporary:
        temporary.write_text("x")
    assert path.read_text() == "x"


def test_a_rename_over_an_open_file_is_retried_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    errors, real_replace = [PermissionError(13, "in use")] * 3, Path.replace

    def replace(self: Path, target: Path) -> Path:
        if errors:
            raise errors.pop()
        return real_replace(self, target)

    monkeypatch.setattr(atomic, "RENAME_PAUSE_S", 0)
    temporary, path = tmp_path / "t", tmp_path / "a"
    temporary.write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(PermissionError):
            atomic.replace(temporary, path)  # on other systems it is a real error
        patch.setattr(atomic, "IS_WINDOWS", True)
        atomic.replace(temporary, path)
    assert path.read_text() == "x" and not errors


def test_a_failed_folder_replacement_leaves_the_old_folder(tmp_path: Path):
    old, new = tmp_path / "out", tmp_path / "new"
    old.mkdir()
    (old / "old").touch()
    with pytest.raises(OSError):
        replace_folder(tmp_path / "none", old)
    assert (old / "old").exists()
    new.mkdir()
    (new / "new").touch()
    replace_folder(new, old)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (old / "new").exists()


def test_a_progress_bar_is_hidden_without_a_terminal_and_yields_all_items(capsys: pytest.CaptureFixture[str]):
    assert list(tracked("abc", "letters", 3)) == ["a", "b", "c"]
    with progress_bar("counting") as advance:
        advance(1, 2, "note")
    assert capsys.readouterr() == ("", "")


def test_the_readme_lists_every_exit_code_with_its_meaning():
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", (CHECKOUT / "README.md").read_text(encoding="utf-8"), re.M))
    assert rows == {str(code): meaning for code, meaning in EXIT_CODES.items()}


def test_no_other_module_has_its_own_temporary_names():
    sources = [
        path
        for folder in ("configs", "datasets", "captioning", "trainer")
        for path in (CHECKOUT / folder).rglob("*.py")
    ]
    assert [path.name for path in sources if '.part"' in path.read_text(encoding="utf-8")] == ["atomic.py"]
