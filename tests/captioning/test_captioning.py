"""Captioning a folder from its file names: what is written, what is never overwritten, resuming, and undo."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from paths import CHECKOUT
from PIL import Image

from scumble.captioning import recipe
from scumble.captioning.captioners.captioner import CAPTIONERS, request_for
from scumble.captioning.captioners.filename import words_of
from scumble.captioning.captioners.request import Existing, SubjectKind
from scumble.captioning.captioners.wording import TEMPLATES, build_prompt, clean_answer, is_allowed
from scumble.configs.errors import Refused
from scumble.trainer import cli


def save_image(path: Path, color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("red_apple-03.png", "blue-cup.jpg", "IMG_2041.webp", "deep/old house (2).png"):
        save_image(tmp_path / name)
    (tmp_path / "blue-cup.txt").write_text("a manual cup\n")
    return tmp_path


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.txt"))}


def scumble(*words: str | Path) -> None:
    cli.main([str(word) for word in words])


NAMES = {"red_apple-03.txt": "red apple\n", "deep/old house (2).txt": "old house\n"}
MANUAL = {"blue-cup.txt": "a manual cup\n"}


@pytest.mark.parametrize(
    ("stem", "words"),
    [
        ("red_apple-03", "red apple"),
        ("RedApple", "Red Apple"),
        ("a man, sitting", "a man, sitting"),
        ("château_d'If 2", "château d'If"),
        ("猫_01", "猫"),
        ("well-known_face", "well known face"),
        ("P1020304", ""),
        ("IMG_20240101_123456", ""),
        ("DSC00021", ""),
        ("PXL_20240102_030405678.MP", "MP"),
        ("Screenshot 2024-01-02 at 03.04.05", "at"),
        ("9b2f4e0c-1a2b-4c3d-8e9f-0123456789ab", ""),
        ("3f2a9c81d4e5b607", ""),
        ("00012-4079573538", ""),
        ("ComfyUI_00012_", ""),
        ("picture of a dog", "of a dog"),
        ("imagine", "imagine"),
        ("cat copy (3)", "cat"),
        ("decade", "decade"),
        ("1024x768 fox v2", "fox"),
    ],
)
def test_the_words_of_a_file_name_are_the_caption(stem: str, words: str):
    assert words_of(stem) == words


def test_images_without_a_caption_get_one_and_no_other_file_changes(photos: Path, capsys: pytest.CaptureFixture[str]):
    scumble("caption", photos)
    assert texts(photos) == NAMES | MANUAL
    output = capsys.readouterr().out
    assert "wrote 2 captions with filename" in output and "1 existing caption kept" in output
    assert "1 image not captioned: filename returned no text for IMG_2041.webp" in output
    assert "red_apple-03.png: red apple" in output
    scumble("caption", photos, "--undo")
    assert texts(photos) == MANUAL


def test_a_dry_run_prints_all_captions_and_writes_nothing(photos: Path, capsys: pytest.CaptureFixture[str]):
    before = sorted(photos.rglob("*"))
    scumble("caption", photos, "--dry-run")
    assert "would write 2 captions" in capsys.readouterr().out and sorted(photos.rglob("*")) == before


def test_only_overwrite_replaces_a_manual_caption_and_undo_restores_it(
    photos: Path, capsys: pytest.CaptureFixture[str]
):
    scumble("caption", photos)
    (photos / "red_apple-03.txt").write_text("red apple, edited\n")
    edited = texts(photos)
    for existing in ("keep", "replace"):
        scumble("caption", photos, "--existing", existing, "--trigger", "zwx")
        assert {name: text for name, text in texts(photos).items() if name in ("red_apple-03.txt", "blue-cup.txt")} == {
            "red_apple-03.txt": "red apple, edited\n", "blue-cup.txt": "a manual cup\n"
        }  # fmt: skip
    assert "2 manual captions kept; --overwrite also replaces manual captions" in capsys.readouterr().out
    assert texts(photos)["deep/old house (2).txt"] == "zwx, old house\n"  # generated, so replace rewrites it
    before = texts(photos)
    scumble("caption", photos, "--overwrite")
    assert texts(photos) == NAMES | {"blue-cup.txt": "blue cup\n"}
    scumble("caption", photos, "--undo")
    assert texts(photos) == before
    scumble("caption", photos, "--undo")
    assert texts(photos) == edited


@pytest.mark.parametrize(
    ("existing", "expected"),
    [
        ("append", "a manual cup, blue cup\n"),
        ("prepend", "blue cup, a manual cup\n"),
        ("line", "a manual cup\nblue cup\n"),
    ],
)
def test_text_is_added_to_a_manual_caption_once_and_it_still_counts_as_manual(
    existing: Existing, expected: str, photos: Path
):
    for _ in range(2):
        scumble("caption", photos, "--existing", existing)
        assert texts(photos) == NAMES | {"blue-cup.txt": expected}
    scumble("caption", photos, "--existing", "replace", "--trigger", "zwx")
    assert texts(photos)["blue-cup.txt"] == expected
    scumble("caption", photos, "--undo")
    scumble("caption", photos, "--undo")
    assert texts(photos) == MANUAL


def test_two_images_with_the_same_name_get_separate_captions(tmp_path: Path):
    save_image(tmp_path / "Fox.png")
    save_image(tmp_path / "fox.jpg")
    scumble("caption", tmp_path)
    assert texts(tmp_path) == {"Fox.png.txt": "Fox\n", "fox.jpg.txt": "fox\n"}


def test_trigger_and_drop_apply_and_regularization_images_are_skipped(photos: Path):
    save_image(photos / "reg/a dog.png")
    scumble("caption", photos, "--trigger", "zwx style", "--trigger-position", "end", "--drop", "RED", "house")
    assert texts(photos) == MANUAL | {
        "red_apple-03.txt": "apple, zwx style\n",
        "deep/old house (2).txt": "old, zwx style\n",
    }


def test_class_words_that_new_captions_lack_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_image(tmp_path / "10_zwx cat/asleep.png")
    save_image(tmp_path / "10_zwx cat/a zwx cat runs.png")
    scumble("caption", tmp_path)
    assert (
        "some captions now lack the class words 'zwx cat' of the folder name; --trigger adds them"
        in capsys.readouterr().out
    )
    scumble("caption", tmp_path, "--undo")
    scumble("caption", tmp_path, "--trigger", "zwx cat")
    assert texts(tmp_path)["10_zwx cat/asleep.txt"] == "zwx cat, asleep\n"
    assert "class words" not in capsys.readouterr().out


def test_an_unreadable_image_is_reported_and_the_others_are_captioned(tmp_path: Path):
    for name in ("a.png", "b.png", "c.png"):
        save_image(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"not an image")
    request = request_for("blip", {}, subject="style", trigger="", trigger_position="front", drop=())
    images = [one for batch in recipe.read_ahead(recipe.read_captions(tmp_path)[0], request, 2, True) for one in batch]
    assert [bool(one.error) for one in images] == [False, True, False]
    assert images[1].error.startswith("cannot be read as an image")


def test_an_interrupted_run_continues_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A captioner that records its images is interrupted after three batches, in every mode for existing captions."""
    requested: list[str] = []

    class Recording:
        def captions(self, images):
            if len(requested) >= 6 and interrupt:
                raise KeyboardInterrupt
            requested.extend(image.path.name for image in images)
            return [image.path.stem for image in images]

    monkeypatch.setitem(CAPTIONERS, "filename", replace(CAPTIONERS["filename"], make=lambda request: Recording()))
    for letter in "abcdefghij":
        save_image(tmp_path / f"{letter}.png")
        (tmp_path / f"{letter}.txt").write_text("mine")
    request = request_for("filename", {}, subject="style", trigger="", trigger_position="front", drop=())
    for existing, overwrite in (("append", False), ("line", False), ("replace", True)):
        requested.clear()
        for interrupt in (True, False):
            try:
                recipe.caption_set(tmp_path, request, existing, overwrite, 2, False, lambda *progress: None)
                assert not interrupt
            except KeyboardInterrupt:
                assert len(requested) == 6
        assert sorted(requested) == [f"{letter}.png" for letter in "abcdefghij"]  # each once
        expected = {"append": "mine, c\n", "line": "mine\nc\n", "replace": "c\n"}[existing]
        assert (tmp_path / "c.txt").read_text() == expected
        scumble("caption", tmp_path, "--undo")
        scumble("caption", tmp_path, "--undo")
        assert {path.read_text() for path in tmp_path.glob("*.txt")} == {"mine"}


def test_ctrl_c_keeps_the_captions_so_far_and_exits_with_code_130(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Interrupted:
        def captions(self, images):
            if images[0].path.parent != photos:
                return [image.path.stem for image in images]
            raise KeyboardInterrupt

    monkeypatch.setitem(CAPTIONERS, "filename", replace(CAPTIONERS["filename"], make=lambda request: Interrupted()))
    with pytest.raises(SystemExit) as stop:
        scumble("caption", photos, "--batch-size", "1")
    assert stop.value.code == 130 and "repeat the command to continue" in capsys.readouterr().err
    assert texts(photos) == MANUAL
    monkeypatch.undo()
    scumble("caption", photos)
    assert texts(photos) == NAMES | MANUAL


def test_the_commands_in_the_readme_run(photos: Path, monkeypatch: pytest.MonkeyPatch):
    page = (CHECKOUT / "captioning/README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    scumble ([^#\n]+)", page, flags=re.MULTILINE)
    assert len(commands) > 10
    (photos / "blue-cup.txt").write_text("grey cat, simple background, moon, moon\n")
    monkeypatch.setenv("HF_HOME", str(photos / "hub"))
    monkeypatch.chdir(photos.parent)
    for command in commands:
        words = [photos.name if word == "photos/" else word for word in shlex.split(command)]
        try:
            scumble(*words)
        except SystemExit as stop:
            needs_model = "--captioner" in words
            nothing_to_undo = "undo" in command
            assert stop.code == (69 if needs_model else 2) and (needs_model or nothing_to_undo), command
    assert (photos / "blue-cup.txt").read_text() == "cat, simple background, moon, at night\n"


@pytest.mark.parametrize(
    ("answer", "style", "character"),
    [
        ("The image shows a cat sitting on a mat.", "a cat sitting on a mat.", "a cat sitting on a mat."),
        ("a painting of a cat on a mat", "a cat on a mat", "a painting of a cat on a mat"),
        ("a close up of a cartoon of a fox", "a close up of a fox", "a close up of a cartoon of a fox"),
        ("The image is a digital painting of a fox.", "a fox.", "The image is a digital painting of a fox."),
        ("araffe image of a dog in a car", "a dog in a car", "a dog in a car"),
        ("arafed woman with a hat", "woman with a hat", "woman with a hat"),
        ("In this picture we can see two cups, one is blue.", "two cups, one is blue.", "two cups, one is blue."),
        ("a fox in the style of Beatrix Potter", "a fox", "a fox in the style of Beatrix Potter"),
        ("fox, watercolor (medium), sitting, sketch", "fox, sitting", "fox, watercolor (medium), sitting, sketch"),
        ("a cat with a picture of a dog", "a cat with a picture of a dog", "a cat with a picture of a dog"),
        ("a man taking a photo of a bird", "a man taking a photo of a bird", "a man taking a photo of a bird"),
        ("<think>Hm.\nA fox.</think>\n\n**A fox** runs.", "A fox runs.", "A fox runs."),
        ('Caption: "A red house."', "A red house.", "A red house."),
        ("a woman in a red dress, in style", "a woman in a red dress", "a woman in a red dress, in style"),
    ],
)
def test_stock_phrases_are_removed_from_answers_and_style_phrases_for_a_style(answer: str, style: str, character: str):
    assert clean_answer(answer, "style") == style
    assert clean_answer(answer, "character") == character


@pytest.mark.parametrize(
    ("tag", "for_style", "for_character"),
    [
        ("sitting", True, True), ("tree", True, True), ("1girl", True, True), ("closed eyes", True, True),
        ("dress", True, True), ("blue dress", True, True), ("smile", True, True), ("hair ribbon", True, True),
        ("watercolor (medium)", False, True), ("monochrome", False, True), ("sketch", False, True),
        ("blue eyes", True, False), ("long hair", True, False), ("blonde hair", True, False),
        ("cat ears", True, False), ("freckles", True, False), ("tail", True, False), ("dark skin", True, False),
    ],
)  # fmt: skip
def test_style_tags_are_removed_for_a_style_and_identity_tags_for_a_character(
    tag: str, for_style: bool, for_character: bool
):
    assert is_allowed(tag, "style") is for_style and is_allowed(tag, "character") is for_character


@pytest.mark.parametrize("subject", list(TEMPLATES))
def test_templates_state_what_to_leave_out_and_the_length(subject: SubjectKind):
    prompt = build_prompt(subject, "short", "zwx")
    assert "12 words" in prompt and "{" not in prompt
    left_out = {"style": ("medium", "technique", "art style"), "character": ("face", "hair", "eyes", "'zwx'")}
    assert all(word in prompt for word in left_out[subject])


@pytest.mark.parametrize(
    ("flags", "line", "code"),
    [
        (["--model", "x"], "--model: not available with --captioner filename, only with blip, florence2, vlm", 2),
        (["--captioner", "blip", "--threshold", "0.3"], "not available with --captioner blip, only with wd-tagger", 2),
        (["--captioner", "blip", "--model", "./none"], "--model ./none: no such folder", 2),
        (["--captioner", "blip"], "Salesforce/blip-image-captioning-large: no such folder, not in the hub's", 69),
        (["--captioner", "wd-tagger"], "wd-eva02-large-tagger-v3: no such folder, not in the hub's", 69),
        (["--captioner", "vlm"], "--model Qwen/Qwen3-VL-4B-Instruct: no such folder, not", 69),
        (["--captioner", "blip", "--device", "mps"], "--device mps: not available to torch", 2),
        (["--captioner", "wd-tagger", "--threshold", "2"], "--threshold 2.0: must be a number from 0 to 1", 2),
        (["--overwrite", "--existing", "append"], "--overwrite: replaces whole captions", 2),
        (["--undo"], "no caption changes to undo", 2),
    ],
)  # fmt: skip
def test_invalid_flags_are_refused_in_one_line(
    flags: list[str], line: str, code: int, photos: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setenv("HF_HOME", str(photos / "hub"))
    with pytest.raises(SystemExit) as stop:
        scumble("caption", photos, *flags)
    message = capsys.readouterr().err.strip()
    assert line in message and len(message.splitlines()) == 1 and stop.value.code == code
    assert texts(photos) == MANUAL


def test_a_missing_package_is_reported_with_its_install_command(photos: Path, monkeypatch: pytest.MonkeyPatch):
    from scumble.captioning.captioners import checkpoint

    with pytest.raises(Refused, match=r'onnxruntme is not installed; run pip install "scumble\[captions\]"') as refused:
        checkpoint.check_packages("wd-tagger", ["onnxruntme"])
    assert refused.value.exit_code == 69
