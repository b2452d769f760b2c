"""The two sample datasets and the held-out list match their README."""

import subprocess
import sys
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from paths import CHECKOUT
from PIL import Image

from scumble.configs.errors import Refused
from scumble.datasets.samples import fetch_held_out as held

ROOT = CHECKOUT
SAMPLES = ROOT / "datasets" / "samples"
SETS = ("clay-style", "clay-cat")
DEMONSTRATED = {"tiger", "rocket", "princess", "castle", "red apple"}


def captions(name: str) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted((SAMPLES / name).glob("*.txt"))]


def images(name: str) -> list[Path]:
    return sorted((SAMPLES / name).glob("*.webp"))


def things(lines: list[str]) -> set[str]:
    return {line.strip().removesuffix(", clay style") for line in lines}


@pytest.mark.parametrize("name", SETS)
def test_every_image_has_a_caption_and_every_caption_an_image(name: str):
    stems = sorted(path.stem for path in (SAMPLES / name).glob("*.txt"))
    assert stems == [path.stem for path in images(name)]
    assert len(list((SAMPLES / name).iterdir())) == 2 * len(stems)


@pytest.mark.parametrize("name", SETS)
def test_every_image_opens_and_is_large_and_about_square(name: str):
    for path in images(name):
        with Image.open(path) as image:
            image.load()
            assert min(image.size) >= 256, path
            assert max(image.size) <= 1.1 * min(image.size), path


def test_no_two_images_are_the_same():
    pixels = [Image.open(path).convert("RGBA").tobytes() for name in SETS for path in images(name)]
    assert len(set(pixels)) == len(pixels)


def test_the_datasets_have_the_required_size():
    assert len(images("clay-style")) == 20
    assert 9 <= len(images("clay-cat")) <= 15


@pytest.mark.parametrize("name", SETS)
def test_every_caption_is_one_line_and_no_two_are_the_same(name: str):
    lines = captions(name)
    assert all(line.endswith("\n") and line.count("\n") == 1 and line.isascii() for line in lines)
    assert len(set(lines)) == len(lines)


def test_captions_name_the_object_and_then_the_style():
    assert all(line.endswith(", clay style\n") for line in captions("clay-style"))
    stems = {path.stem for path in images("clay-style")}
    assert stems == {thing.replace(" ", "-") for thing in things(captions("clay-style"))}


def test_captions_of_the_character_start_with_its_trigger_word():
    assert all(line.startswith("clay cat, ") for line in captions("clay-cat"))


def test_the_demonstration_words_are_held_out():
    assert not things(captions("clay-style")) & DEMONSTRATED
    assert things([row.caption for row in held.held_out()]) >= DEMONSTRATED


def test_the_held_out_list_has_hundreds_of_rows_without_duplicates():
    rows = held.held_out()
    assert len(rows) >= 200
    assert len({row.code for row in rows}) == len({row.name for row in rows}) == len(rows)
    assert len({row.stem for row in rows}) == len(rows)
    assert all(row.caption == f"{row.name}, clay style" and row.code for row in rows)


def test_no_held_out_image_is_in_the_datasets():
    names = {row.name for row in held.held_out()}
    assert not names & things(captions("clay-style"))
    assert "cat face" not in names


def test_the_readme_states_the_number_of_held_out_images():
    readme = (SAMPLES / "README.md").read_text(encoding="utf-8")
    assert f"lists {len(held.held_out())} further images" in readme


def test_fetching_refuses_a_folder_that_is_not_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.txt").write_text("kept")
    assert held.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path}: is not empty; choose a new folder, or empty this one\n"


def test_fetching_without_npm_is_refused_in_one_line(tmp_path: Path):
    command = [sys.executable, "-m", "scumble.datasets.samples.fetch_held_out", str(tmp_path / "new")]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 69
    assert done.stderr == "npm: not found on PATH; install Node.js, then run this command again\n"


def test_held_out_images_are_written_with_their_captions(tmp_path: Path):
    package, folder = tmp_path / "package", tmp_path / "out"
    package.mkdir()
    folder.mkdir()
    rows = held.held_out()
    for row in rows[1:]:
        (package / f"{row.code}.webp").write_bytes(row.code.encode())
    with pytest.raises(Refused, match=rf"1 images are missing, first {rows[0].code}\.webp"):
        held.write(package, folder)
    assert not list(folder.iterdir())
    (package / f"{rows[0].code}.webp").write_bytes(rows[0].code.encode())
    assert held.write(package, folder) == len(rows) == len(list(folder.glob("*.webp")))
    assert (folder / "red-apple.webp").read_bytes() == b"1f34e"
    assert (folder / "red-apple.txt").read_text() == "red apple, clay style\n"


def test_the_wheel_contains_the_datasets_their_license_and_the_held_out_list():
    shipped = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    expected = [path.relative_to(ROOT) for name in SETS for path in (SAMPLES / name).iterdir()]
    documents = ("README.md", "LICENSE-fluent-emoji", held.LIST.name)
    expected += [Path("datasets/samples") / name for name in documents]
    assert {f"scumble/{path.as_posix()}" for path in expected} <= shipped
