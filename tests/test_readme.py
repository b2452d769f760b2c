"""The READMEs are true: commands run, links lead somewhere, the maps name every file."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from paths import CHECKOUT
from tiny import tiny_base

from scumble.trainer import cli

READMES = [path for path in CHECKOUT.rglob("README.md") if not {".venv", "build", "demo"} & set(path.parts)]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
MAP = (CHECKOUT / "trainer/README.md").read_text(encoding="utf-8").partition("## Map")[2]
FOLDERS = "configs", "datasets", "captioning", "trainer"


def mapped() -> set[str]:
    """Files that the map of the code names, by their path in the checkout; a heading names their folder."""
    found, folder = set(), ""
    for line in MAP.splitlines():
        if line.startswith("### "):
            folder = line.split("`")[1]
        elif row := re.match(r"\| `(\S+)` \|", line):
            found.add(folder + row[1])
    return found


def test_the_map_names_every_module_and_nothing_else():
    modules = {
        path.relative_to(CHECKOUT).as_posix()
        for folder in FOLDERS
        for path in (CHECKOUT / folder).rglob("*.py")
        if path.name != "__init__.py" and "bases" not in path.parts
    }
    assert mapped() == modules


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.relative_to(CHECKOUT).as_posix())
def test_links_lead_somewhere(readme: Path):
    for target in re.findall(r"\]\(([^)#\s]+)\)", readme.read_text(encoding="utf-8")):
        assert target.startswith("http") or (readme.parent / target).exists(), target


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    (?:\$ )?scumble ([^#\n]+)", README, flags=re.MULTILINE)
    (tmp_path / "photos").mkdir()
    for stem in ("fox", "panda"):
        for suffix in (".webp", ".txt"):
            source = CHECKOUT / "datasets/samples/clay-style" / f"{stem}{suffix}"
            (tmp_path / "photos" / source.name).write_bytes(source.read_bytes())
    tiny_base("sdxl", tmp_path / "sdxl.safetensors")  # a folder by that name: a base with random weights
    quick = {
        "train": ["--steps", "2", "--preview-every", "0", "--resolution", "64"],
        "preview": ["--prompts", "fox", "--num-inference-steps", "2", "--preview-size", "64"],
    }
    assert len(commands) >= 5
    for command in commands:
        capsys.readouterr()
        try:
            words = shlex.split(command)
            cli.main(words + quick.get(words[0], []))
        except SystemExit as stop:
            line = capsys.readouterr().err.strip()
            assert stop.code in (None, 0) or line in README or words[0] == "check", line


def test_make_knows_the_commands_that_the_readmes_name():
    text = "".join(path.read_text(encoding="utf-8") for path in READMES)
    for target in set(re.findall(r"`make ([a-z-]+)", text)) | set(re.findall(r"^    make ([a-z-]+)", text, re.M)):
        subprocess.run(["make", "-n", target], cwd=CHECKOUT, check=True, capture_output=True)
