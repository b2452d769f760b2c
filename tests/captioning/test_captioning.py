"""Captioning a folder by the names of its files: what is written, what is never overwritten, going on, undo."""

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
from scumble.captioning.captioners.wording import TEMPLATES, asked, belongs, cleaned
from scumble.configs.errors import Refused
from scumble.trainer import cli


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("red_apple-03.png", "blue-cup.jpg", "IMG_2041.webp", "deep/old house (2).png"):
        picture(tmp_path / name)
    (tmp_path / "blue-cup.txt").write_text("a cup by hand\n")
    return tmp_path


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.txt"))}


def scumble(*words: str | Path) -> None:
    cli.main([str(word) for word in words])


NAMES = {"red_apple-03.txt": "red apple\n", "deep/old house (2).txt": "old house\n"}
BY_HAND = {"blue-cup.txt": "a cup by hand\n"}


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
def test_the_words_of_a_name_are_its_caption(stem: str, words: str):
    assert words_of(stem) == words


def test_pictures_without_a_caption_get_one_and_no_other_file_changes(photos: Path, capsys: pytest.CaptureFixture[str]):
    scumble("caption", photos)
    assert texts(photos) == NAMES | BY_HAND
    told = capsys.readouterr().out
    assert "wrote 2 captions by filename" in told and "1 got none: filename has no word for IMG_2041.webp" in told
    assert "red_apple-03.png: red apple" in told
    scumble("caption", photos, "--undo")
    assert texts(photos) == BY_HAND


def test_a_dry_run_prints_all_and_writes_nothing(photos: Path, capsys: pytest.CaptureFixture[str]):
    before = sorted(photos.rglob("*"))
    scumble("caption", photos, "--dry-run")
    assert "would write 2 captions" in capsys.readouterr().out and sorted(photos.rglob("*")) == before


def test_a_caption_by_hand_is_replaced_by_overwrite_alone_and_undo_brings_it_back(
    photos: Path, capsys: pytest.CaptureFixture[str]
):
    scumble("caption", photos)
    (photos / "red_apple-03.txt").write_text("red apple, edited\n")
    mine = texts(photos)
    for existing in ("keep", "replace"):
        scumble("caption", photos, "--existing", existing, "--trigger", "zwx")
        assert {name: text for name, text in texts(photos).items() if name in ("red_apple-03.txt", "blue-cup.txt")} == {
            "red_apple-03.txt": "red apple, edited\n", "blue-cup.txt": "a cup by hand\n"
        }  # fmt: skip
    assert "2 kept because a person wrote them; --overwrite replaces those too" in capsys.readouterr().out
    assert texts(photos)["deep/old house (2).txt"] == "zwx, old house\n"  # ours, and replace says so
    before = texts(photos)
    scumble("caption", photos, "--overwrite")
    assert texts(photos) == NAMES | {"blue-cup.txt": "blue cup\n"}
    scumble("caption", photos, "--undo")
    assert texts(photos) == before
    scumble("caption", photos, "--undo")
    assert texts(photos) == mine


@pytest.mark.parametrize(
    ("existing", "expected"),
    [
        ("append", "a cup by hand, blue cup\n"),
        ("prepend", "blue cup, a cup by hand\n"),
        ("line", "a cup by hand\nblue cup\n"),
    ],
)
def test_words_are_put_to_a_caption_by_hand_once_and_it_stays_one_by_hand(
    existing: Existing, expected: str, photos: Path
):
    for _ in range(2):
        scumble("caption", photos, "--existing", existing)
        assert texts(photos) == NAMES | {"blue-cup.txt": expected}
    scumble("caption", photos, "--existing", "replace", "--trigger", "zwx")
    assert texts(photos)["blue-cup.txt"] == expected
    scumble("caption", photos, "--undo")
    scumble("caption", photos, "--undo")
    assert texts(photos) == BY_HAND


def test_two_pictures_of_one_name_get_a_caption_each(tmp_path: Path):
    picture(tmp_path / "Fox.png")
    picture(tmp_path / "fox.jpg")
    scumble("caption", tmp_path)
    assert texts(tmp_path) == {"Fox.png.txt": "Fox\n", "fox.jpg.txt": "fox\n"}


def test_trigger_and_dropped_words_and_regularisation_pictures_left_alone(photos: Path):
    picture(photos / "reg/a dog.png")
    scumble("caption", photos, "--trigger", "zwx style", "--trigger-position", "end", "--drop", "RED", "house")
    assert texts(photos) == BY_HAND | {
        "red_apple-03.txt": "apple, zwx style\n",
        "deep/old house (2).txt": "old, zwx style\n",
    }


def test_class_words_of_a_folder_that_are_heard_no_more_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture(tmp_path / "10_zwx cat/asleep.png")
    picture(tmp_path / "10_zwx cat/a zwx cat runs.png")
    scumble("caption", tmp_path)
    assert "the folder's words 'zwx cat' were the caption so far" in capsys.readouterr().out
    scumble("caption", tmp_path, "--undo")
    scumble("caption", tmp_path, "--trigger", "zwx cat")
    assert texts(tmp_path)["10_zwx cat/asleep.txt"] == "zwx cat, asleep\n"
    assert "folder's words" not in capsys.readouterr().out


def test_a_picture_that_cannot_be_read_is_named_and_the_others_are_captioned(tmp_path: Path):
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"no picture")
    request = request_for("blip", {}, subject="style", trigger="", trigger_position="front", drop=())
    seen = [one for batch in recipe.read_ahead(recipe.read_texts(tmp_path)[0], request, 2, True) for one in batch]
    assert [bool(one.reason) for one in seen] == [False, True, False]
    assert "cannot be read as a picture" in seen[1].reason


def test_a_run_that_is_cut_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A captioner that counts what it is asked, cut after three batches; in every way of treating what is there."""
    asked_for: list[str] = []

    class Counting:
        def captions(self, pictures):
            if len(asked_for) >= 6 and cut:
                raise KeyboardInterrupt
            asked_for.extend(one.path.name for one in pictures)
            return [one.path.stem for one in pictures]

    monkeypatch.setitem(CAPTIONERS, "filename", replace(CAPTIONERS["filename"], make=lambda request: Counting()))
    for letter in "abcdefghij":
        picture(tmp_path / f"{letter}.png")
        (tmp_path / f"{letter}.txt").write_text("mine")
    request = request_for("filename", {}, subject="style", trigger="", trigger_position="front", drop=())
    for existing, overwrite in (("append", False), ("line", False), ("replace", True)):
        asked_for.clear()
        for cut in (True, False):
            try:
                recipe.caption_set(tmp_path, request, existing, overwrite, 2, False, lambda *told: None)
                assert not cut
            except KeyboardInterrupt:
                assert len(asked_for) == 6
        assert sorted(asked_for) == [f"{letter}.png" for letter in "abcdefghij"]  # each once
        expected = {"append": "mine, c\n", "line": "mine\nc\n", "replace": "c\n"}[existing]
        assert (tmp_path / "c.txt").read_text() == expected
        scumble("caption", tmp_path, "--undo")
        scumble("caption", tmp_path, "--undo")
        assert {path.read_text() for path in tmp_path.glob("*.txt")} == {"mine"}


def test_ctrl_c_leaves_the_captions_so_far_and_exit_code_130(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Interrupted:
        def captions(self, pictures):
            if pictures[0].path.parent != photos:
                return [one.path.stem for one in pictures]
            raise KeyboardInterrupt

    monkeypatch.setitem(CAPTIONERS, "filename", replace(CAPTIONERS["filename"], make=lambda request: Interrupted()))
    with pytest.raises(SystemExit) as stop:
        scumble("caption", photos, "--batch-size", "1")
    assert stop.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    assert texts(photos) == BY_HAND
    monkeypatch.undo()
    scumble("caption", photos)
    assert texts(photos) == NAMES | BY_HAND


def test_commands_of_the_explanation_run(photos: Path, monkeypatch: pytest.MonkeyPatch):
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
            nothing_done = "undo" in command
            assert stop.code == (69 if needs_model else 2) and (needs_model or nothing_done), command
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
def test_answers_are_cleaned_of_empty_words_and_for_a_style_of_words_on_it(answer: str, style: str, character: str):
    assert cleaned(answer, "style") == style
    assert cleaned(answer, "character") == character


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
def test_tags_leave_out_the_painting_for_a_style_and_the_person_for_a_character(
    tag: str, for_style: bool, for_character: bool
):
    assert belongs(tag, "style") is for_style and belongs(tag, "character") is for_character


@pytest.mark.parametrize("subject", list(TEMPLATES))
def test_templates_say_what_to_leave_out_and_how_long_to_be(subject: SubjectKind):
    words = asked(subject, "short", "zwx")
    assert "12 words" in words and "{" not in words
    left_out = {"style": ("medium", "technique", "art style"), "character": ("face", "hair", "eyes", "'zwx'")}
    assert all(word in words for word in left_out[subject])


@pytest.mark.parametrize(
    ("flags", "line", "code"),
    [
        (["--model", "x"], "--model: not for --captioner filename; blip, florence2, vlm, wd-tagger take it", 2),
        (["--captioner", "blip", "--threshold", "0.3"], "--threshold: not for --captioner blip; wd-tagger takes it", 2),
        (["--captioner", "blip", "--model", "./none"], "--model ./none: no such folder", 2),
        (["--captioner", "blip"], "Salesforce/blip-image-captioning-large: no such folder here, not in the hub's", 69),
        (["--captioner", "wd-tagger"], "wd-eva02-large-tagger-v3: no such folder here, not in the hub's", 69),
        (["--captioner", "vlm"], "--model Qwen/Qwen3-VL-4B-Instruct: no such folder here", 69),
        (["--captioner", "blip", "--device", "mps"], "--device mps: this machine has none", 2),
        (["--captioner", "wd-tagger", "--threshold", "2"], "--threshold 2.0: must be a number from 0 to 1", 2),
        (["--overwrite", "--existing", "append"], "--overwrite replaces whole captions", 2),
        (["--undo"], "no change of captions to take back", 2),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_one_line(
    flags: list[str], line: str, code: int, photos: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setenv("HF_HOME", str(photos / "hub"))
    with pytest.raises(SystemExit) as stop:
        scumble("caption", photos, *flags)
    told = capsys.readouterr().err.strip()
    assert line in told and len(told.splitlines()) == 1 and stop.value.code == code
    assert texts(photos) == BY_HAND


def test_a_missing_package_is_named_with_what_installs_it(photos: Path, monkeypatch: pytest.MonkeyPatch):
    from scumble.captioning.captioners import checkpoint

    with pytest.raises(Refused, match=r'onnxruntme is not installed; pip install "scumble\[captions\]"') as refused:
        checkpoint.check_packages("wd-tagger", ["onnxruntme"])
    assert refused.value.exit_code == 69
