"""The README is true: its tree names what is there, its commands run, its links lead somewhere."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from paths import CHECKOUT
from tiny import tiny_base

from scumble.trainer import cli

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
TREE = README.split("```")[1]


def test_every_module_stands_in_the_tree():
    for room in ("configs", "datasets", "captioning", "trainer", "tests"):
        for path in (CHECKOUT / room).glob("*.py"):
            assert path.name in TREE or path.name in ("__init__.py", "conftest.py"), path


def test_every_file_in_the_tree_is_there():
    for word in re.findall(r"[\w-]+\.(?:py|md|toml|txt)", TREE):
        assert list(CHECKOUT.rglob(word)), word


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (CHECKOUT / target).exists(), target


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    (?:\$ )?scumble ([^#\n]+)", README, flags=re.MULTILINE)
    (tmp_path / "photos").mkdir()
    for stem in ("fox", "owl"):
        for suffix in (".webp", ".txt"):
            source = CHECKOUT / "datasets/samples/clay-style" / f"{'fox' if stem == 'fox' else 'panda'}{suffix}"
            (tmp_path / "photos" / f"{stem}{suffix}").write_bytes(source.read_bytes())
    tiny_base("sdxl", tmp_path / "sdxl.safetensors")  # a folder by that name: a base with random weights
    quick = ["--steps", "2", "--preview-every", "0", "--resolution", "64"]
    assert len(commands) >= 6
    for command in commands:
        capsys.readouterr()
        try:
            words = shlex.split(command)
            training = words[0] == "train" and "--dry-run" not in words and words[1] == "photos/"
            cli.main(words + (quick if training else []))
        except SystemExit as stop:
            line = capsys.readouterr().err.strip()
            assert stop.code in (None, 0) or line in README, line


def test_make_knows_the_commands_that_the_readme_names():
    for target in set(re.findall(r"make (demo|test|sketch)\b", README)):
        subprocess.run(["make", "-n", target], cwd=CHECKOUT, check=True, capture_output=True)
