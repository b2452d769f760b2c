"""The captioners on tiny real models: each returns the captions its model was trained on, at any batch size."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from tiny_captioners import CAPTIONS, TASK_PROMPT, color_image, tiny_blip, tiny_florence, tiny_qwen, tiny_tagger
from transformers import AutoProcessor, BlipForConditionalGeneration

from scumble.captioning.captioners.captioner import CAPTIONERS, make_captioner, request_for
from scumble.captioning.captioners.picture import ImageFile, shrink, split_on_oom
from scumble.captioning.captioners.tagger import Tag, TagRules, preprocess, replace_underscores, select_tags
from scumble.configs.errors import Refused
from scumble.trainer import cli

TINY: dict[str, Callable[[Path], Path]] = {"blip": tiny_blip, "florence2": tiny_florence, "vlm": tiny_qwen}
FLAGS = {"vlm": ["--prompt", "Describe"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def model(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = TINY[kind](tmp_path_factory.mktemp(kind))
        return folders[kind]

    return model


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five images in two colors and different shapes, in mixed order."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("red", (48, 32)), ("blue", (200, 50)), ("blue", (30, 90)), ("red", (64, 64)), ("blue", (9, 9))):
        color_image(name, size).save(folder / f"{size[0]}-{name}.png")
    return folder


def expected(folder: Path) -> dict[str, str]:
    return {path.stem: CAPTIONS[path.stem.split("-")[1]] + "\n" for path in folder.glob("*.png")}


def texts(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in folder.glob("*.txt")}


@pytest.mark.parametrize("kind", list(TINY))
@pytest.mark.parametrize("batch", ["1", "3"])
def test_a_model_returns_the_learned_caption_for_every_image(
    kind: str, batch: str, models: Callable[[str], Path], photos: Path
):
    flags = FLAGS.get(kind, [])
    cli.main(["caption", str(photos), "--captioner", kind, "--model", str(models(kind)), "--batch-size", batch, *flags])
    assert texts(photos) == expected(photos)


@pytest.mark.parametrize("kind", list(TINY))
def test_precision_and_max_tokens_take_effect(kind: str, models: Callable[[str], Path]):
    given = {
        "model": str(models(kind)),
        "precision": "bf16",
        "max_tokens": 2,
        "prompt": "Describe" if kind == "vlm" else None,
    }
    captioner = make_captioner(request_for(kind, given, subject="style", trigger="", trigger_position="none", drop=()))
    assert {parameter.dtype for parameter in captioner.model.parameters()} == {torch.bfloat16}  # ty: ignore
    image = ImageFile(Path("none.png"))
    image.__dict__["pixels"] = color_image("red")
    (caption,) = captioner.captions([image])
    assert CAPTIONS["red"].startswith(caption) and 1 <= len(caption.split()) <= 2


def test_blip_captions_equal_those_of_transformers(models: Callable[[str], Path], photos: Path):
    folder = models("blip")
    processor = AutoProcessor.from_pretrained(folder)
    model = BlipForConditionalGeneration.from_pretrained(folder)
    paths = sorted(photos.glob("*.png"))
    captioner = make_captioner(
        request_for("blip", {"model": str(folder)}, subject="style", trigger="", trigger_position="", drop=())
    )
    for path, caption in zip(paths, captioner.captions([ImageFile(path) for path in paths]), strict=True):
        ids = model.generate(
            **processor(images=Image.open(path).convert("RGB"), return_tensors="pt"), max_new_tokens=20
        )
        assert caption == processor.decode(ids[0], skip_special_tokens=True)


def test_blip_continues_a_prompt(models: Callable[[str], Path], photos: Path):
    flags = ["--captioner", "blip", "--model", str(models("blip")), "--prompt", "a blue dog in"]
    cli.main(["caption", str(photos), *flags, "--trigger", "zwx"])
    assert texts(photos)["30-blue"] == "zwx, a blue dog in the house\n"
    assert texts(photos)["48-red"].startswith("zwx, a blue dog in ")


def test_vlm_accepts_an_image_text_to_text_model_without_a_chat_template(models: Callable[[str], Path], photos: Path):
    model = str(models("florence2"))
    flags = ["--captioner", "vlm", "--model", model, "--prompt", " ".join(TASK_PROMPT)]
    cli.main(["caption", str(photos), *flags])
    assert texts(photos) == expected(photos)


def test_a_batch_that_runs_out_of_memory_is_halved_until_it_fits(photos: Path):
    images = [ImageFile(path) for path in sorted(photos.glob("*.png"))]
    sizes = []

    def generate(batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return [image.path.stem for image in batch]

    assert split_on_oom(images, generate) == [image.path.stem for image in images]
    assert sizes == [5, 2, 3, 1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        split_on_oom(images[:1], lambda batch: (_ for _ in ()).throw(torch.OutOfMemoryError()))


def test_large_images_are_scaled_down_and_small_ones_are_unchanged():
    assert shrink(Image.new("RGB", (4000, 1000)), 1024).size == (1024, 256)
    small = Image.new("RGB", (40, 10))
    assert shrink(small, 1024) is small


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model_type": "bert"}, "has model type bert, not blip; use --captioner vlm"),
        ({"auto_map": {"AutoModel": "mine.Model"}}, "requires custom code (auto_map), which is never executed"),
        (None, "not a transformers model (no config.json in"),
        ("weights", "has no .safetensors weights; pickles (.bin) are unsafe to load"),
    ],
)
def test_an_unsupported_model_is_refused_before_it_is_loaded(
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
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and line in message and len(message.splitlines()) == 1


# WD taggers


@pytest.mark.parametrize("fixed_batch", [False, True])
def test_a_tagger_returns_tags_above_the_thresholds_by_probability(fixed_batch: bool, photos: Path, tmp_path: Path):
    tagger = tmp_path / "tagger"
    tagger.mkdir()
    command = ["caption", str(photos), "--captioner", "wd-tagger", "--model", str(tiny_tagger(tagger, fixed_batch))]
    cli.main([*command, "--batch-size", "3"])
    assert set(texts(photos).values()) == {"red dress, ^_^\n", "blue sky\n"}  # `sketch` is a style tag
    assert texts(photos)["200-blue"] == "blue sky\n"  # blue center, white padding
    cli.main(
        [*command, "--existing", "replace", "--kind", "character", "--categories", "character", "general", "rating"]
    )
    assert texts(photos)["48-red"] == "red (hero), red dress, ^_^, sketch, general\n"
    more = ["--keep-underscores", "--categories", "character", "general"]
    more += ["--character-threshold", "0.95", "--threshold", "0.85"]
    cli.main([*command, "--existing", "replace", *more])
    assert texts(photos)["48-red"] == "red_dress, ^_^\n"


def test_a_tagger_receives_the_whole_image_on_a_white_square_in_bgr_from_0_to_255():
    pixels = preprocess(Image.new("RGB", (100, 50), (255, 128, 0)), 100)
    assert pixels.shape == (100, 100, 3) and pixels.dtype == np.float32
    assert (pixels[:25] == 255).all() and (pixels[75:] == 255).all()
    assert (pixels[25:75] == (0, 128, 255)).all()
    assert preprocess(Image.new("RGB", (30, 900)), 448).shape == (448, 448, 3)


def test_a_tagger_model_returns_the_expected_probabilities(photos: Path, tmp_path: Path):
    tiny_tagger(tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (row,) = np.asarray(session.run(None, {"input": preprocess(color_image("red"), 8)[None]})[0])
    np.testing.assert_allclose(row[:6], [0, 0, 1, 0.9, 0.8, 0.9], atol=1e-6)


def test_underscores_become_spaces_except_in_emoticons():
    assert [replace_underscores(tag) for tag in ("long_hair", "^_^", "o_o", "||_||", "red_(hero)")] == [
        "long hair", "^_^", "o_o", "||_||", "red (hero)"
    ]  # fmt: skip


def test_the_character_threshold_applies_only_to_character_names():
    tags = [Tag("smile", "general"), Tag("miku", "character"), Tag("rin", "character")]
    rules = TagRules(0.3, 0.8, ("general", "character"), False, "style")
    assert select_tags(np.array([0.4, 0.7, 0.9]), tags, rules) == ["rin", "smile"]


@pytest.mark.parametrize("missing", ["model.onnx", "selected_tags.csv", "column", "row", "onnx"])
def test_a_folder_that_is_not_a_tagger_is_refused(missing: str, tmp_path: Path, photos: Path):
    folder = tmp_path / "tagger"
    folder.mkdir()
    tiny_tagger(folder)
    tags = folder / "selected_tags.csv"
    if missing == "column":
        tags.write_text("id,tag\n1,a\n")
    elif missing == "row":
        tags.write_text("\n".join(tags.read_text().splitlines()[:-1]))
    elif missing == "onnx":
        (folder / "model.onnx").write_bytes(b"no model")
    else:
        (folder / missing).unlink()
    lines = {
        "column": "no columns name and category",
        "row": "has 8 tags, but selected_tags.csv has 7",
        "onnx": "cannot load model.onnx",
    }
    with pytest.raises(Refused, match=lines.get(missing, f"no {missing} in")):
        request = request_for(
            "wd-tagger", {"model": str(folder)}, subject="style", trigger="", trigger_position="", drop=()
        )
        make_captioner(request).captions([ImageFile(path) for path in photos.glob("*.png")])


def test_every_captioner_except_filename_has_a_default_model_and_the_help_explains_captions(
    capsys: pytest.CaptureFixture[str],
):
    assert [name for name, info in CAPTIONERS.items() if "/" not in info.model] == ["filename"]
    cli.main(["caption", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "For a style, describe the content of the image but not how it is made" in text
    assert "not who the character is" in text
