"""Reading dataset folders: each file is used, or reported with the reason why not."""

import json
import os
from itertools import permutations
from pathlib import Path

import pytest
from odd_pictures import DAMAGES, FORMATS, plain, write_corpus
from PIL import Image

from scumble.captioning.commands_edit import add as captions_edit
from scumble.configs.errors import Refused
from scumble.configs.options import Data, declared
from scumble.datasets.captions import caption_at_step, with_folder_rules
from scumble.datasets.crops import crop_examples, tables
from scumble.datasets.reading.dataset_toml import BY_FLAG
from scumble.datasets.reading.folder import ImageSet, read_set
from scumble.datasets.reading.images import Size, center_crop, read_size
from scumble.datasets.tensors import cropped
from scumble.trainer import cli


def put(path: Path, caption: str | bytes = "") -> Path:
    """Save a small image, and a caption file next to it if a caption is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain().save(path)
    if caption:
        path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    return path


def captions(found: ImageSet) -> dict[str, str]:
    return {example.image.name: example.caption for example in found.examples}


def left_out(found: ImageSet) -> dict[str, str]:
    return {one.path.name: one.reason for one in found.left_out}


def test_400_intact_and_damaged_files_are_each_used_or_reported_and_used_ones_can_be_cropped(tmp_path: Path):
    paths = write_corpus(tmp_path)
    assert len(paths) == len(FORMATS) * len(DAMAGES) >= 400
    found = read_set(tmp_path)
    used, reported = {example.image for example in found.examples}, {one.path for one in found.left_out}
    assert used | reported == set(paths) and not used & reported
    assert all(one.reason and one.is_image for one in found.left_out)
    for damage, is_used in {
        "whole": True,
        "text-after": True,
        "empty": False,
        "header-only": False,
        "half": False,
    }.items():
        assert {path in used for path in paths if path.parent.name == damage} == {is_used}, damage
    for image in used:
        assert cropped(image, center_crop(read_size(image), Size(32, 32))).isfinite().all()


def test_a_dry_run_on_the_corpus_lists_all_left_out_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = write_corpus(tmp_path)
    cli.main(["train", str(tmp_path), "--dry-run", "--json"])
    events = {event["kind"]: event for event in map(json.loads, capsys.readouterr().out.splitlines())}
    names = [path for path in paths if any(line.startswith(f"{path}: ") for line in events["images"]["left_out"])]
    used = sum(bucket["images"] for bucket in events["images"]["buckets"])
    assert len(names) == len(events["images"]["left_out"]) and used + len(names) == len(paths)
    cli.main(["train", str(tmp_path), "--dry-run"])
    shown = capsys.readouterr().out
    assert "left out: " in shown and f"and {len(names) - 20} more" in shown


def test_folders_can_be_nested_and_kohya_folders_set_repeats_and_class_words(tmp_path: Path):
    for name in ("a.png", "deep/er/b.png", "10_zwx cat/c.png", "10_zwx cat/sitting/d.png", "2023_trip/e.png"):
        put(tmp_path / name)
    put(tmp_path / "3_dog/f.png", "a dog that runs")
    put(tmp_path / "reg/1_cat/g.png")
    found = read_set(tmp_path, repeats=2)
    settings = {
        example.image.name: (example.caption, example.repeats, example.is_regularization) for example in found.examples
    }
    assert settings == {
        "a.png": ("", 2, False), "b.png": ("", 2, False), "c.png": ("zwx cat", 20, False),
        "d.png": ("zwx cat", 20, False), "e.png": ("", 2, False), "f.png": ("a dog that runs", 6, False),
        "g.png": ("cat", 2, True),
    }  # fmt: skip
    (inside,) = [example for example in read_set(tmp_path / "10_zwx cat").examples if example.image.name == "c.png"]
    assert (inside.repeats, inside.words, inside.sidecar) == (10, "zwx cat", None)
    put(tmp_path / "0_none/h.png")
    assert "repeats must be at least 1" in left_out(read_set(tmp_path))["0_none"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_captions_can_have_any_unicode_encoding(encoding: str, tmp_path: Path):
    text = "a bear, zwölf Äste"
    data = text.encode(encoding)
    if encoding == "utf-16-be":
        data = b"\xfe\xff" + data
    put(tmp_path / "a.png", data)
    (example,) = read_set(tmp_path).examples
    assert example.caption == text and example.lines == (text,) and example.sidecar == tmp_path / "a.txt"


def test_an_image_whose_caption_is_not_unicode_is_left_out(tmp_path: Path):
    put(tmp_path / "a.png", "Bär".encode("latin-1"))
    put(tmp_path / "b.png", "熊の絵、かわいい".encode("shift-jis"))
    put(tmp_path / "c.png", "fine")
    (tmp_path / "d.txt").write_bytes(b"x" * 1_000_001)
    put(tmp_path / "d.png")
    found = read_set(tmp_path)
    assert captions(found) == {"c.png": "fine"}
    for name in "ab":
        assert f"{name}.txt is not UTF-8: save it as UTF-8 or delete it" in left_out(found)[f"{name}.png"]
    assert "larger than 1 MB" in left_out(found)["d.png"]


def test_caption_files_match_images_regardless_of_case_and_unicode_normalization(tmp_path: Path):
    for name in ("A.PNG", "b.jpeg", "cafe\u0301.png", "d.png"):
        put(tmp_path / name)
    (tmp_path / "a.TXT").write_text("upper")
    (tmp_path / "b.Caption").write_text("caption")
    (tmp_path / "caf\u00e9.txt").write_text("composed")
    (tmp_path / "d.txt").write_text("\n one \n\n  two\tthree \n")
    (tmp_path / "stray.txt").write_text("unmatched")
    found = read_set(tmp_path)
    assert captions(found) == {
        "A.PNG": "upper", "b.jpeg": "caption", "cafe\u0301.png": "composed", "d.png": "one two three"
    }  # fmt: skip
    assert next(example.lines for example in found.examples if example.image.name == "d.png") == ("one", "two three")
    assert left_out(found) == {"stray.txt": "no image with this name"}


def test_two_images_with_the_same_stem_share_a_caption_unless_each_has_its_own(tmp_path: Path):
    put(tmp_path / "a.png", "both")
    put(tmp_path / "a.jpg")
    put(tmp_path / "b.png", "one")
    (tmp_path / "b.caption").write_text("another")
    found = read_set(tmp_path)
    assert captions(found) == {"a.png": "both", "a.jpg": "both", "b.png": "one"}
    assert [str(remark).removeprefix(f"{tmp_path}/") for remark in found.remarks] == [
        "a.png: shares its caption a.txt with a.jpg"
    ]
    assert left_out(found) == {"b.caption": "b.txt is used instead"}
    (tmp_path / "a.jpg.txt").write_text("mine")
    assert captions(read_set(tmp_path))["a.jpg"] == "mine"


def test_links_are_followed_once_and_broken_links_are_reported(tmp_path: Path):
    put(tmp_path / "set/real/a.png")
    put(tmp_path / "elsewhere/b.png")
    (tmp_path / "set/b.png").symlink_to(tmp_path / "elsewhere/b.png")
    (tmp_path / "set/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/also-real").symlink_to(tmp_path / "set/real")
    (tmp_path / "set/real/loop").symlink_to(tmp_path / "set")
    (tmp_path / "set/dead.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "set/self.png").symlink_to("self.png")
    found = read_set(tmp_path / "set")
    assert [str(example.image.relative_to(tmp_path / "set")) for example in found.examples] == [
        "b.png", "more/b.png", "real/a.png"
    ]  # fmt: skip
    assert left_out(found) == {
        "also-real": "links to a folder that is already included", "loop": "links to a folder that is already included",
        "dead.png": "broken link", "self.png": "broken link",
    }  # fmt: skip


def test_file_names_in_any_script_length_or_encoding_do_not_stop_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    long = "n" * (255 - len(".png"))
    for name in ("絵 🐱", "[red]x[/red]", "a\nb", long, "'quote\"", "-rf"):
        put(tmp_path / f"{name}.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes((tmp_path / "-rf.png").read_bytes())
    (tmp_path / "[b]x.psd").write_bytes(b"8BPS")
    os.mkfifo(tmp_path / "pipe.png")
    found = read_set(tmp_path)
    assert len(found.examples) == 6
    assert left_out(found) == {
        "caf\\xe9.png": "file name is not UTF-8; rename the file",
        "[b]x.psd": ".psd is not supported; convert it to PNG",
        "pipe.png": "not a regular file",
    }  # fmt: skip
    cli.main(["train", str(tmp_path), "--dry-run"])
    assert "[b]x.psd: .psd is not supported" in capsys.readouterr().out


def test_system_files_are_skipped_silently_and_all_others_are_reported(tmp_path: Path):
    put(tmp_path / "a.png")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "notes.md", "._a.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".git").mkdir()
    assert left_out(read_set(tmp_path)) == {"notes.md": "not an image", "._a.png": "hidden file"}


def test_run_folders_models_and_check_up_reports_are_not_used_for_training(tmp_path: Path):
    put(tmp_path / "a.png")
    put(tmp_path / "runs/a/previews/step000000-00.png")
    put(tmp_path / "check/a-check.jpg")
    put(tmp_path / "base/image.png")
    for name in ("runs/a/events.jsonl", "check/a-check.html", "base/model_index.json"):
        (tmp_path / name).touch()
    found = read_set(tmp_path)
    assert list(captions(found)) == ["a.png"]
    assert left_out(found) == {
        "a": "run folder, not training images", "base": "model folder, not training images",
        "check": "check-up report, not training images",
    }  # fmt: skip


def test_caption_tables_follow_hugging_face_imagefolder(tmp_path: Path):
    for name in ("a.png", "train/b.png", "train/c.png", "test/d.png"):
        put(tmp_path / name)
    rows = [
        {"file_name": "a.png", "text": "an a"}, {"file_name": "train/b.png", "text": "a b"},
        {"file_name": "train/b.png", "text": "again b"}, {"file_name": "gone.png", "text": "gone"}, {"text": "no file"},
    ]  # fmt: skip
    lines = "\n".join([*map(json.dumps, rows), "{broken"])
    (tmp_path / "metadata.jsonl").write_text(lines)
    (tmp_path / "train/metadata.csv").write_text('file_name,text\nc.png,"a c, with a comma"\n')
    found = read_set(tmp_path)
    assert captions(found) == {"a.png": "an a", "b.png": "a b again b", "c.png": "a c, with a comma"}
    assert next(example for example in found.examples if example.image.name == "b.png").lines == ("a b", "again b")
    assert left_out(found) == {"test": "test split next to a train folder, not used for training"}
    assert [remark.text for remark in found.remarks] == [
        "row 5 has no file_name", "row 6 is not a JSON object", "lists gone.png, which does not exist"
    ]  # fmt: skip
    (tmp_path / "a.txt").write_text("by hand")
    assert captions(read_set(tmp_path))["a.png"] == "by hand"


@pytest.mark.parametrize(
    "data",
    [b"file_name;caption\r\na.png;semicolons\r\n", "\ufefffile_name,caption\na.png,semicolons\n".encode(),
     "file_name\tcaption\na.png\tsemicolons\n".encode("utf-16")],
)  # fmt: skip
def test_caption_tables_from_any_spreadsheet_program_are_read(data: bytes, tmp_path: Path):
    put(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes(data)
    assert captions(read_set(tmp_path)) == {"a.png": "semicolons"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "the table is empty"), (b"a,b\n1,2\n", "row 2 has no file_name"), (b"\xff\xff\xff", "is not UTF-8"),
     (b"file_name,x\na.png,1\n", "row 2 has no caption")],
)  # fmt: skip
def test_an_invalid_caption_table_is_reported_and_its_images_are_still_used(data: bytes, reason: str, tmp_path: Path):
    put(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes(data)
    found = read_set(tmp_path)
    assert captions(found) == {"a.png": ""} and reason in left_out(found)["metadata.csv"]


def test_a_list_of_folders_sets_repeats_words_and_regularization_per_folder(tmp_path: Path):
    put(tmp_path / "photos/cat/a.png")
    put(tmp_path / "photos/b.png", "a b")
    put(tmp_path / "class/c.png")
    listing = tmp_path / "set.toml"
    listing.write_text(
        '[[folders]]\npath = "photos/cat"\nrepeats = 3\nwords = "zwx cat"\n[[folders]]\npath = "photos"\n'
        '[[folders]]\npath = "class"\nregularization = true\n'
    )
    found = read_set(listing, repeats=2)
    settings = [
        (example.image.name, example.caption, example.repeats, example.is_regularization) for example in found.examples
    ]
    assert settings == [("a.png", "zwx cat", 6, False), ("b.png", "a b", 2, False), ("c.png", "", 2, True)]


KOHYA = """
[general]
shuffle_caption = true
keep_tokens = 2
caption_extension = ".tags"
enable_bucket = true

[[datasets]]
resolution = 512
batch_size = 4

  [[datasets.subsets]]
  image_dir = "cat"
  class_tokens = "zwx cat"
  num_repeats = 5
  caption_prefix = "photo of"
  color_aug = true
  enable_wildcard = true
  flip_aug = true
  random_crop = true
  caption_tag_dropout_rate = 0.25

  [[datasets.subsets]]
  image_dir = "reg"
  is_reg = true
  caption_dropout_rate = 0.1
  enable_wildcard = false
  color_aug = false
"""


def test_a_kohya_dataset_file_is_read_and_ignored_options_are_reported(tmp_path: Path):
    put(tmp_path / "cat/a.png")
    put(tmp_path / "cat/b.png")
    put(tmp_path / "cat/deeper/c.png")
    (tmp_path / "cat/a.tags").write_text("on a mat")
    put(tmp_path / "reg/r.png")
    (tmp_path / "kohya.toml").write_text(KOHYA)
    found = read_set(tmp_path / "kohya.toml")
    settings = [
        (example.image.name, example.caption, example.repeats, example.is_regularization) for example in found.examples
    ]
    assert settings == [
        ("a.png", "photo of on a mat", 5, False), ("b.png", "photo of zwx cat", 5, False), ("r.png", "", 1, True)
    ]  # fmt: skip
    assert [remark.text for remark in found.remarks] == [
        "resolution = 512 is ignored: it applies to the whole dataset; use --resolution",
        "batch_size = 4 is ignored: it applies to the whole dataset; use --batch-size",
        "color_aug = True is ignored: colors are part of what the adapter learns",
    ]
    assert left_out(found) == {"deeper": "subfolder, not read for a kohya subset"}
    general = {"shuffle_tags": True, "keep_tags": 2}
    cat = general | {
        "wildcards": True,
        "caption_lines": "pick",
        "random_flip": True,
        "crop": "random",
        "tag_dropout": 0.25,
    }
    reg = general | {"wildcards": False, "caption_dropout": 0.1}
    assert [dict(example.rules) for example in found.examples] == [cat, cat, reg]


def test_folder_options_override_the_run_for_the_images_of_that_folder_only(tmp_path: Path):
    put(tmp_path / "cat/a.png", "a, b, c, d")
    put(tmp_path / "dog/b.png", "a, b, c, d")
    listing = tmp_path / "set.toml"
    listing.write_text(
        '[[folders]]\npath = "cat"\nrandom_flip = true\nshuffle_tags = true\n'
        'caption_suffix = "in ink"\ncaption_dropout = 0\n'
        '[[folders]]\npath = "dog"\ncaption_dropout = 1\n'
    )
    cat, dog = read_set(listing).examples
    cropped_examples = crop_examples([cat, dog], tables(Data(), 64, 8), Data(), seed=0)
    assert [len(one.crops) for one in cropped_examples] == [2, 1]
    texts = [
        {caption_at_step(one.lines, with_folder_rules(Data(), one.rules), seed=0, step=n, index=0) for n in range(60)}
        for one in (cat, dog)
    ]
    orders = {", ".join(("a", *rest)) + " in ink" for rest in permutations("bcd")}
    assert texts == [orders, {""}]


def test_a_kohya_metadata_file_gives_captions_and_tags(tmp_path: Path):
    for name in ("cat/a.png", "cat/b.png", "cat/in/c.png", "cat/d.png", "far/e.png"):
        put(tmp_path / name, "not read")
    entries = {
        "a": {"caption": "a cat", "tags": "sitting, mat", "train_resolution": [512, 512]}, "b.png": {"tags": "asleep"},
        "in/c": {"caption": "one\ntwo", "tags": "x\ny"}, "gone": {"caption": "?"}, "d": {},
    }  # fmt: skip
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    (tmp_path / "far.json").write_text(json.dumps({str(tmp_path / "far/e.png"): {"caption": "far"}}))
    subset = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cat"\nmetadata_file = "meta.json"\nnum_repeats = 2\n'
    (tmp_path / "set.toml").write_text(subset + '[[datasets.subsets]]\nmetadata_file = "far.json"\n')
    found = read_set(tmp_path / "set.toml")
    assert {example.image.name: example.lines for example in found.examples} == {
        "a.png": ("a cat, sitting, mat",), "b.png": ("asleep",), "c.png": ("one", "two, x, y"), "d.png": (),
        "e.png": ("far",),
    }  # fmt: skip
    assert [example.repeats for example in found.examples] == [2, 2, 2, 2, 1]
    assert [remark.text for remark in found.remarks] == [
        "d has neither caption nor tags", "lists gone, which does not exist"
    ]  # fmt: skip
    assert set(left_out(found).values()) == {
        "not used, captions come from meta.json", "not used, captions come from far.json"
    }  # fmt: skip
    with pytest.raises(Refused, match=r"meta\.json: captions in this file cannot be edited"):
        captions_edit(tmp_path / "set.toml", "x")

    del entries["b.png"]
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    (tmp_path / "set.toml").write_text(subset + "enable_wildcard = true\n")
    found = read_set(tmp_path / "set.toml")
    assert left_out(found)["b.png"] == "not listed in meta.json"
    assert found.examples[-1].lines == ("one, x, y", "two, x, y")


@pytest.mark.parametrize(
    ("text", "refusal"), [("[1]", "must be a JSON object"), ("{", "is not JSON"), (None, "cannot be read")]
)
def test_a_metadata_file_in_another_format_is_refused(text: str | None, refusal: str, tmp_path: Path):
    put(tmp_path / "cat/a.png")
    if text:
        (tmp_path / "meta.json").write_text(text)
    (tmp_path / "set.toml").write_text(
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cat"\nmetadata_file = "meta.json"'
    )
    with pytest.raises(Refused, match=r"meta\.json") as refused:
        read_set(tmp_path / "set.toml")
    assert refusal in str(refused.value)


def test_flags_suggested_for_kohya_keys_exist():
    known = {entry.flag for entry in declared()}
    assert {flag.split()[0].replace("--no-", "--") for flag in BY_FLAG.values()} <= known


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("[[folders]]\npth = 'a'\n", "no such key pth in [[folders]] (did you mean path?)"),
        ("[[folders]]\nrepeats = 2\n", "[[folders]]: has no path; add path = …"),
        ("[[folders]]\npath = 'a'\nrepeats = '2'\n", "repeats = 2: must be a whole number"),
        ("[[folders]]\npath = 'a'\nrepeats = 0\n", "repeats = 0: must be a whole number from 1 to 10000"),
        ("[[folders]]\npath = 'a'\ntag_dropout = 1.0\n", "tag_dropout = 1.0: must be a number from 0 to below 1"),
        (
            "[[folders]]\npath = 'a'\nrandom_flap = true\n",
            "no such key random_flap in [[folders]] (did you mean random_flip?)",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nkeep_tokens = 1.5\n",
            "keep_tokens = 1.5: must be a whole number",
        ),
        ("[[folders]]\npath = 'none'\n", "none: no such folder"),
        ("[[folder]]\npath = 'a'\n", "no such table [folder] (did you mean folders?)"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dirr = 'a'\n", "no such key image_dirr in kohya's subsets"),
        ("folders = 3\n", "folders: must be tables, each headed [[folders]]"),
        ("[general]\n", "lists no folders"),
        ("[[folders]\n", "is not TOML"),
    ],
)  # fmt: skip
def test_invalid_entries_in_a_list_of_folders_are_refused_by_key(text: str, refusal: str, tmp_path: Path):
    put(tmp_path / "a/x.png")
    (tmp_path / "set.toml").write_text(text)
    with pytest.raises(Refused) as refused:
        read_set(tmp_path / "set.toml")
    assert refusal in str(refused.value) and "set.toml" in str(refused.value)


def test_train_accepts_a_list_of_folders_in_place_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    put(tmp_path / "a/x.png", "an x")
    (tmp_path / "mine.toml").write_text("[[folders]]\npath = 'a'\n")
    for arguments in ([str(tmp_path / "mine.toml")], ["--images", str(tmp_path / "mine.toml")]):
        cli.main(["train", *arguments, "--dry-run", "--json"])
        plan = json.loads(capsys.readouterr().out.partition("\n")[0])
        assert plan["name"] == "mine" and plan["reasons"][0].startswith("1 image ")


def test_a_dataset_without_usable_images_is_refused_with_the_first_reason(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(Refused, match=r"none of its images can be used \(1 left out\); the first is .*a\.png: .*empty"):
        read_set(tmp_path)


def test_reading_with_decode_false_does_not_check_pixels(tmp_path: Path):
    put(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    assert [example.image.name for example in read_set(tmp_path, decode=False).examples] == ["a.png", "b.png"]


def test_folders_can_be_nested_very_deeply(tmp_path: Path):
    put(tmp_path.joinpath(*["d"] * 400, "a.png"))
    assert len(read_set(tmp_path).examples) == 1


def test_images_of_extreme_sizes_are_read(tmp_path: Path):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (3000, 1)).save(tmp_path / "thread.png")
    assert [read_size(example.image) for example in read_set(tmp_path).examples] == [Size(1, 1), Size(3000, 1)]


@pytest.mark.parametrize("command", ["train", "check", "caption"])
@pytest.mark.parametrize(
    ("name", "words"),
    [("a.png", "is an image; name its folder"), ("lora.safetensors", "is a model file; name a folder of images")],
)
def test_a_file_in_place_of_a_folder_is_named_for_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, name: str, words: str
):
    (tmp_path / name).write_bytes(b"\x89PNG\xff")
    with pytest.raises(SystemExit) as stop:
        cli.main([command, str(tmp_path / name)])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and words in line and "delete" not in line
