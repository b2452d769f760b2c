"""The captioners on tiny real models: each says what its model was taught, in batches as one by one."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from tiny_captioners import ASKED, CAPTIONS, colour, tiny_blip, tiny_florence, tiny_qwen, tiny_tagger
from transformers import AutoProcessor, BlipForConditionalGeneration

from scumble.captioning.captioners.captioner import CAPTIONERS, make_captioner, request_for
from scumble.captioning.captioners.picture import Picture, in_halves, within
from scumble.captioning.captioners.tagger import Rules, Tag, chosen, prepared, spaced
from scumble.configs.errors import Refused
from scumble.trainer import cli

TINY: dict[str, Callable[[Path], Path]] = {"blip": tiny_blip, "florence2": tiny_florence, "vlm": tiny_qwen}
WORDS = {"vlm": ["--prompt", "Describe"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def model(kind: str) -> Path:
        if kind not in made:
            made[kind] = TINY[kind](tmp_path_factory.mktemp(kind))
        return made[kind]

    return model


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five pictures of two colours and different shapes in an order that mixes them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("red", (48, 32)), ("blue", (200, 50)), ("blue", (30, 90)), ("red", (64, 64)), ("blue", (9, 9))):
        colour(name, size).save(folder / f"{size[0]}-{name}.png")
    return folder


def expected(folder: Path) -> dict[str, str]:
    return {path.stem: CAPTIONS[path.stem.split("-")[1]] + "\n" for path in folder.glob("*.png")}


def texts(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in folder.glob("*.txt")}


@pytest.mark.parametrize("kind", list(TINY))
@pytest.mark.parametrize("batch", ["1", "3"])
def test_a_model_says_what_it_was_taught_of_every_picture(
    kind: str, batch: str, models: Callable[[str], Path], photos: Path
):
    words = WORDS.get(kind, [])
    cli.main(["caption", str(photos), "--captioner", kind, "--model", str(models(kind)), "--batch-size", batch, *words])
    assert texts(photos) == expected(photos)


@pytest.mark.parametrize("kind", list(TINY))
def test_half_precision_and_the_longest_answer_are_heeded(kind: str, models: Callable[[str], Path]):
    given = {
        "model": str(models(kind)),
        "precision": "bf16",
        "max_tokens": 2,
        "prompt": "Describe" if kind == "vlm" else None,
    }
    captioner = make_captioner(request_for(kind, given, subject="style", trigger="", trigger_position="none", drop=()))
    assert {parameter.dtype for parameter in captioner.model.parameters()} == {torch.bfloat16}  # ty: ignore
    picture = Picture(Path("none.png"))
    picture.__dict__["pixels"] = colour("red")
    (said,) = captioner.captions([picture])
    assert CAPTIONS["red"].startswith(said) and 1 <= len(said.split()) <= 2


def test_blip_says_what_transformers_itself_says(models: Callable[[str], Path], photos: Path):
    folder = models("blip")
    processor = AutoProcessor.from_pretrained(folder)
    model = BlipForConditionalGeneration.from_pretrained(folder)
    paths = sorted(photos.glob("*.png"))
    captioner = make_captioner(
        request_for("blip", {"model": str(folder)}, subject="style", trigger="", trigger_position="", drop=())
    )
    for path, said in zip(paths, captioner.captions([Picture(path) for path in paths]), strict=True):
        ids = model.generate(
            **processor(images=Image.open(path).convert("RGB"), return_tensors="pt"), max_new_tokens=20
        )
        assert said == processor.decode(ids[0], skip_special_tokens=True)


def test_blip_goes_on_from_a_prompt(models: Callable[[str], Path], photos: Path):
    words = ["--captioner", "blip", "--model", str(models("blip")), "--prompt", "a blue dog in"]
    cli.main(["caption", str(photos), *words, "--trigger", "zwx"])
    assert texts(photos)["30-blue"] == "zwx, a blue dog in the house\n"
    assert texts(photos)["48-red"].startswith("zwx, a blue dog in ")


def test_any_model_of_pictures_and_text_will_do_without_a_chat_template_too(
    models: Callable[[str], Path], photos: Path
):
    model = str(models("florence2"))
    words = ["--captioner", "vlm", "--model", model, "--prompt", " ".join(ASKED)]
    cli.main(["caption", str(photos), *words])
    assert texts(photos) == expected(photos)


def test_a_batch_that_does_not_fit_is_halved_until_it_does(photos: Path):
    pictures = [Picture(path) for path in sorted(photos.glob("*.png"))]
    sizes = []

    def describe(some):
        sizes.append(len(some))
        if len(some) > 2:
            raise torch.OutOfMemoryError
        return [one.path.stem for one in some]

    assert in_halves(pictures, describe) == [one.path.stem for one in pictures]
    assert sizes == [5, 2, 3, 1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        in_halves(pictures[:1], lambda some: (_ for _ in ()).throw(torch.OutOfMemoryError()))


def test_large_pictures_are_made_smaller_and_small_ones_stay():
    assert within(Image.new("RGB", (4000, 1000)), 1024).size == (1024, 256)
    small = Image.new("RGB", (40, 10))
    assert within(small, 1024) is small


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model_type": "bert"}, "is bert, not blip; --captioner vlm takes others"),
        ({"auto_map": {"AutoModel": "mine.Model"}}, "brings a program of its own, which is not run"),
        (None, "no config.json in"),
        ("weights", "has no .safetensors; pickles (.bin) can run any program"),
    ],
)
def test_what_is_no_model_of_that_kind_is_refused_before_it_is_loaded(
    change: dict | str | None, line: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = tmp_path / "model"
    model.mkdir()
    if change is not None:
        settings = change if isinstance(change, dict) else {}
        (model / "config.json").write_text(json.dumps({"model_type": "blip"} | settings))
    if change != "weights":
        (model / "model.safetensors").write_bytes(b"")
    (model / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        cli.main(["caption", str(photos), "--captioner", "blip", "--model", str(model)])
    told = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and line in told and len(told.splitlines()) == 1


# WD taggers


@pytest.mark.parametrize("fixed_batch", [False, True])
def test_a_tagger_says_tags_above_the_thresholds_the_surest_first(fixed_batch: bool, photos: Path, tmp_path: Path):
    tagger = tmp_path / "tagger"
    tagger.mkdir()
    words = ["caption", str(photos), "--captioner", "wd-tagger", "--model", str(tiny_tagger(tagger, fixed_batch))]
    cli.main([*words, "--batch-size", "3"])
    assert set(texts(photos).values()) == {"red dress, ^_^\n", "blue sky\n"}  # a sketch is not said of a style
    assert texts(photos)["200-blue"] == "blue sky\n"  # the padding is white, and not what is in the middle
    cli.main([*words, "--existing", "replace", "--kind", "character", "--categories", "character", "general", "rating"])
    assert texts(photos)["48-red"] == "red (hero), red dress, ^_^, sketch, general\n"
    more = ["--keep-underscores", "--categories", "character", "general"]
    more += ["--character-threshold", "0.95", "--threshold", "0.85"]
    cli.main([*words, "--existing", "replace", *more])
    assert texts(photos)["48-red"] == "red_dress, ^_^\n"


def test_a_tagger_sees_the_whole_picture_on_a_white_square_in_bgr_from_0_to_255():
    pixels = prepared(Image.new("RGB", (100, 50), (255, 128, 0)), 100)
    assert pixels.shape == (100, 100, 3) and pixels.dtype == np.float32
    assert (pixels[:25] == 255).all() and (pixels[75:] == 255).all()
    assert (pixels[25:75] == (0, 128, 255)).all()
    assert prepared(Image.new("RGB", (30, 900)), 448).shape == (448, 448, 3)


def test_a_tagger_gives_what_onnxruntime_gives(photos: Path, tmp_path: Path):
    tiny_tagger(tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (row,) = np.asarray(session.run(None, {"input": prepared(colour("red"), 8)[None]})[0])
    np.testing.assert_allclose(row[:6], [0, 0, 1, 0.9, 0.8, 0.9], atol=1e-6)


def test_underscores_become_spaces_but_in_faces():
    assert [spaced(tag) for tag in ("long_hair", "^_^", "o_o", "||_||", "red_(hero)")] == [
        "long hair", "^_^", "o_o", "||_||", "red (hero)"
    ]  # fmt: skip


def test_a_character_threshold_counts_for_names_alone():
    tags = [Tag("smile", "general"), Tag("miku", "character"), Tag("rin", "character")]
    rules = Rules(0.3, 0.8, ("general", "character"), False, "style")
    assert chosen(np.array([0.4, 0.7, 0.9]), tags, rules) == ["rin", "smile"]


@pytest.mark.parametrize("lacking", ["model.onnx", "selected_tags.csv", "column", "row", "onnx"])
def test_a_folder_that_is_no_tagger_is_refused(lacking: str, tmp_path: Path, photos: Path):
    folder = tmp_path / "tagger"
    folder.mkdir()
    tiny_tagger(folder)
    tags = folder / "selected_tags.csv"
    if lacking == "column":
        tags.write_text("id,tag\n1,a\n")
    elif lacking == "row":
        tags.write_text("\n".join(tags.read_text().splitlines()[:-1]))
    elif lacking == "onnx":
        (folder / "model.onnx").write_bytes(b"no model")
    else:
        (folder / lacking).unlink()
    line = {"column": "no columns name and category", "row": "knows 8 tags, selected_tags.csv 7", "onnx": "cannot load"}
    with pytest.raises(Refused, match=line.get(lacking, f"no {lacking} in")):
        request = request_for(
            "wd-tagger", {"model": str(folder)}, subject="style", trigger="", trigger_position="", drop=()
        )
        make_captioner(request).captions([Picture(path) for path in photos.glob("*.png")])


def test_every_captioner_but_that_of_names_has_a_usual_model_and_help_says_what_captions_are_for(
    capsys: pytest.CaptureFixture[str],
):
    assert [name for name, kind in CAPTIONERS.items() if "/" not in kind.model] == ["filename"]
    cli.main(["caption", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "For a style, tell what is in the picture and nothing of how it is painted" in told
    assert "nothing of who it is" in told
