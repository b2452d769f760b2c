"""The check-up: measures against references, detection in damaged copies, no false alarms on the sample datasets."""

import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import combinations
from math import erf
from pathlib import Path

import numpy as np
import pytest
from paths import CHECKOUT
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from transformers import CLIPTokenizer

from scumble.configs import files
from scumble.configs.errors import Refused
from scumble.datasets import fonts
from scumble.datasets.checkup.checkup import CHECKS, Checkup
from scumble.datasets.checkup.contact_sheet import sheet, wrapped
from scumble.datasets.checkup.duplicates import difference, likeness_of, look_alike, same_picture
from scumble.datasets.checkup.html_page import frame_of, page, shown_of
from scumble.datasets.checkup.jpeg import block_steps, quality_of
from scumble.datasets.checkup.letterbox import Borders, borders_of
from scumble.datasets.checkup.picture_checks import HIGH_STEPS, SOFT_PX
from scumble.datasets.checkup.sharpness import edge_blur
from scumble.datasets.checkup.token_window import read_window, read_windows
from scumble.datasets.checkup.watermarks import corners_of, stamps_in
from scumble.datasets.fonts import drawn
from scumble.datasets.reading.images import read_rgb
from scumble.trainer import cli
from scumble.trainer.base_model.detect import BASES, detect_base
from scumble.trainer.plan.training_set import crop_set, read_examples, run_checkup
from scumble.trainer.train import train

SAMPLES = CHECKOUT / "datasets/samples"
STYLE = sorted((SAMPLES / "clay-style").glob("*.webp"))
CAT = sorted((SAMPLES / "clay-cat").glob("*.webp"))
# phash of ImageHash 4.3.2 for the sample images over white, sorted by name
IMAGEHASH = [
    "b161c792c31dcc1f", "b3cad034cf489ec3", "ebcab42dc03ac678", "ba92c14f8f3c986c", "ba8dd0639c1acd3a",
    "bd49c517c4b28763", "bfd0c2e0c52fd01b", "e9969760386f1b1c", "bfc0d806b435e52d", "bec0c04fcd3cd631",
    "bec4c633cb49e82c", "be36c1c14c9c936b", "bfdac221a596923a", "b895e1698661dca7", "bcc1c73c903661db",
    "ba914f6c947ae107", "eec1941a9174e56b", "e46d9b93919cc634", "eec1c54f923ad264", "b09ccf6a38ce7225",
    "bec1c136c13ed06d", "bfc1c336b432c22d", "bfc9c1369436c82d", "bfc1c336b432906d", "fe91c06ab466c92d",
    "afd8c1239467783c", "bfc9c1369436c82d", "bfd1c063b03cc24f", "bfd2c234b06ed22c",
]  # fmt: skip


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [read_rgb(path) for path in [*STYLE, *CAT]]


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts of SD 1.5 that model detection needs; a check reads no weights."""
    folder = tmp_path_factory.mktemp("bases") / "sd15"
    shutil.copytree(BASES / "sd15", folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").touch()
    return folder


def checkup_of(folder: Path, base: str = "sketch", **data: object) -> Checkup:
    options = files.resolve(flags={"model": {"base": base}, "data": {"images": str(folder)} | data})
    source, found = detect_base(options.model), read_examples(options)
    return run_checkup(options, source, found, crop_set(found, options, source), with_thumbs=True)


def problems(done: Checkup) -> dict[str, str]:
    return {one.check: one.severity for one in done.findings if one.severity != "note"}


def gray(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    written = io.BytesIO()
    image.save(written, "JPEG", quality=quality)
    return Image.open(written).convert("RGB")


def copied(folder: Path, paths: list[Path], caption: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    for path in paths:
        shutil.copy(path, folder / path.name)
        text = caption or path.with_suffix(".txt").read_text()
        (folder / path.with_suffix(".txt").name).write_text(text)
    return folder


@pytest.mark.parametrize(("name", "kind"), [("clay-style", "style"), ("clay-cat", "character")])
def test_the_sample_datasets_have_no_findings_at_their_intended_resolution(name: str, kind: str):
    done = checkup_of(SAMPLES / name, kind=kind, trigger=name.replace("-", " "))
    found = [one for one in done.findings if one.severity != "note"]
    if name == "clay-cat":  # sketch has a limit of 14 tokens, and this caption has 15
        assert [(one.check, list(one.details)) for one in found] == [
            ("long caption", [str(SAMPLES / "clay-cat/shocked.webp")])
        ]
    else:
        assert found == [] and done.findings == ()


def test_no_two_sample_images_count_as_duplicates_though_nine_show_the_same_cat(images: list[Image.Image]):
    likenesses = [likeness_of(image) for image in images]
    assert same_picture(likenesses) == []
    assert {index for group in look_alike(likenesses) if len(group) > 3 for index in group} <= set(range(20, 29))


def test_the_hash_equals_that_of_imagehash(images: list[Image.Image]):
    assert [f"{likeness_of(image).hash:016x}" for image in images] == IMAGEHASH


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.resize((64, 64), Image.Resampling.LANCZOS),
        lambda p: jpeg(p, 10),
        lambda p: p.filter(ImageFilter.GaussianBlur(2)),
        lambda p: p.point([int(255 * (level / 255) ** 1.6) for level in range(256)] * 3),
        lambda p: p.point([int(0.6 * level) for level in range(256)] * 3),
        ImageOps.mirror,
    ],
    ids=["smaller", "jpeg", "blurred", "gamma", "darker", "mirrored"],
)
def test_every_damaged_copy_is_detected_as_a_duplicate(
    damage: Callable[[Image.Image], Image.Image], images: list[Image.Image]
):
    for image in images:
        assert same_picture([likeness_of(image), likeness_of(damage(image))]) == [[0, 1]]


def test_a_copy_is_detected_among_a_hundred_similar_images(images: list[Image.Image]):
    rng = np.random.default_rng(0)
    background = np.asarray(images[0].resize((64, 64)))

    def variant() -> Image.Image:
        pixels = background.copy()
        pixels[24:40, 24:40] = rng.integers(60, 200, (2, 2, 3)).repeat(8, 0).repeat(8, 1)
        return Image.fromarray(pixels)

    some = [variant() for _ in range(100)]
    copies = [some[7].resize((40, 40)), ImageOps.mirror(some[60]), some[80].point(lambda level: level // 2)]
    likenesses = [likeness_of(one) for one in (*some, *copies)]
    near = sum((one.hash ^ other.hash).bit_count() <= 12 for one, other in combinations(likenesses, 2))
    assert near > 16 * len(likenesses) and same_picture(likenesses) == [[7, 100], [60, 101], [80, 102]]


def test_duplicate_detection_ignores_tones_but_not_a_local_change():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert difference(pixels, pixels // 2) < 0.02
    changed = pixels.copy()
    changed[10:14, 10:14] = 255 - changed[10:14, 10:14]
    assert difference(pixels, changed) > 0.1


@pytest.mark.parametrize("sigma_px", [1.0, 1.5, 2.0, 3.0, 4.0])
def test_the_blur_of_an_edge_is_measured_in_pixels(sigma_px: float):
    """The reference is a slanted edge with the exact profile of a Gaussian blur, an error function."""
    rows, columns = np.mgrid[:200, :200]
    distance = (columns - 100) * 0.87 + (rows - 100) * 0.5
    edge = 128 + 100 * np.vectorize(erf)(distance / sigma_px / 2**0.5)
    assert edge_blur(edge) == pytest.approx(sigma_px, rel=0.12)


def test_blurred_images_are_distinguished_from_sharp_ones(images: list[Image.Image]):
    blurred = [image.filter(ImageFilter.GaussianBlur(2)) for image in images]
    assert all(edge_blur(gray(image)) < SOFT_PX / 2 for image in images)
    assert all(edge_blur(gray(image)) > SOFT_PX for image in blurred)
    assert all(edge_blur(gray(image.filter(ImageFilter.GaussianBlur(12)))) > 3 * SOFT_PX for image in images)
    worse = [jpeg(image.filter(ImageFilter.GaussianBlur(3)), 75) for image in images]
    assert all(edge_blur(gray(image)) > SOFT_PX for image in worse)


def test_a_sharp_object_on_a_soft_background_is_sharp(images: list[Image.Image]):
    background = Image.effect_noise((256, 256), 90).filter(ImageFilter.GaussianBlur(6)).convert("RGB")
    for path in STYLE[:6]:
        object_image = Image.open(path).convert("RGBA").resize((110, 110))
        scene = background.copy()
        scene.paste(object_image, (70, 70), object_image)
        assert edge_blur(gray(scene)) < SOFT_PX


def test_an_image_without_edges_has_no_blur():
    assert edge_blur(np.full((64, 64), 200, np.uint8)) == 0
    assert edge_blur(np.zeros((4, 4), np.uint8)) == 0


@pytest.mark.parametrize("quality", [1, 10, 25, 49, 50, 51, 75, 90, 95, 100])
def test_the_jpeg_quality_is_the_one_used_for_saving(quality: int, images: list[Image.Image], tmp_path: Path):
    images[0].save(tmp_path / "it.jpg", quality=quality)
    assert quality_of(tmp_path / "it.jpg") == pytest.approx(quality, abs=1)
    images[0].save(tmp_path / "it.png")
    assert quality_of(tmp_path / "it.png") is None


def test_jpeg_blocks_are_detected_in_other_formats_and_after_a_crop(images: list[Image.Image]):
    def detection_rate(quality: int, left: int = 0) -> float:
        damaged = [gray(jpeg(image, quality))[:, left:] for image in images]
        return float(np.mean([block_steps(image) >= HIGH_STEPS for image in damaged]))

    assert detection_rate(20) == 1 and detection_rate(30) > 0.9 and detection_rate(30, left=3) > 0.9
    assert detection_rate(75) == detection_rate(90) == 0
    assert not any(block_steps(gray(image)) for image in images)  # the originals are lossy WebP


def test_bars_are_measured_to_the_pixel_and_a_white_background_is_not_a_bar(images: list[Image.Image]):
    for image in images:
        assert not borders_of(np.asarray(image))
        assert borders_of(np.asarray(ImageOps.expand(image, (0, 30), "black"))) == Borders(top=30, bottom=30)
        assert borders_of(np.asarray(ImageOps.expand(image, (9, 0), (70, 0, 0)))) == Borders(left=9, right=9)
        assert borders_of(np.asarray(ImageOps.expand(image, 12, "navy"))) == Borders(12, 12, 12, 12)


def test_a_mark_in_most_images_is_found_in_its_corner(images: list[Image.Image]):
    clean = [corners_of(image) for image in images[:20]]
    marked = []
    for image in images[:20]:
        copy = image.copy()
        ImageDraw.Draw(copy).text((8, 6), "mira", (60, 60, 60), ImageFont.load_default(16))
        marked.append(corners_of(copy))
    assert [stamp.place for stamp in stamps_in(marked)] == ["upper left"]
    assert [stamp.place for stamp in stamps_in(marked[:15] + clean[15:])] == ["upper left"]
    assert stamps_in(clean) == stamps_in(marked[:5] + clean[5:]) == stamps_in(marked[:3]) == []


@pytest.mark.parametrize("base", ["sd15", "sdxl", "sketch"])
def test_tokens_and_truncation_equal_those_of_transformers(base: str):
    window = read_window(BASES / base / "tokenizer")
    reference = CLIPTokenizer.from_pretrained(BASES / base / "tokenizer")
    texts = ["a cat", "Zwx_style, it's 2024; naïve café 日本語 🐈", " double  spaces ", "a-b c'est l'été!!!", "x" * 300]
    texts += ["", "one two three four five six seven eight nine ten, " * 12]
    for text in texts:
        count = window.count(text)
        ids = reference(text, add_special_tokens=False).input_ids
        assert count.tokens == len(ids)
        cut = reference(text, truncation=True, max_length=window.size + 2).input_ids[1:-1]
        if text.isascii():  # otherwise the cut may be inside a character; the last token may be the start of a word
            assert reference(count.kept, add_special_tokens=False).input_ids[:-1] == cut[:-1]
        assert (count.lost != "") == (len(ids) > window.size)


def test_a_single_file_tokenizer_gives_the_same_tokens_and_equal_tokenizers_are_read_once(tmp_path: Path):
    CLIPTokenizer.from_pretrained(BASES / "sd15/tokenizer").save_pretrained(tmp_path)
    assert not (tmp_path / "merges.txt").exists()
    text = "zwx, naïve café, " * 30
    assert read_window(tmp_path).count(text) == read_window(BASES / "sd15/tokenizer").count(text)
    assert len(read_windows([BASES / "sdxl/tokenizer", BASES / "sdxl/tokenizer_2"])) == 1
    with pytest.raises(Refused, match="its tokenizer cannot be read"):
        read_windows([tmp_path / "none"])


def test_each_kind_of_image_problem_is_found(tmp_path: Path, sd15: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(3)
    for index in range(12):  # large, sharp and different from each other
        image = read_rgb(STYLE[index]).resize((768, 768), Image.Resampling.LANCZOS)
        field = Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8))
        field = field.resize((768, 768), Image.Resampling.BICUBIC)
        scene = Image.composite(image, field, image.convert("L").point(lambda level: 0 if level > 250 else 255))
        ImageDraw.Draw(scene).line([(20, 30 * index), (700, 740)], "white", 1)
        scene.save(folder / f"{index:02}.png")
        (folder / f"{index:02}.txt").write_text(f"zwx, image {'abcdefghijkl'[index]}")
    assert problems(checkup_of(folder, str(sd15), trigger="zwx")) == {}

    def put(name: str, image: Image.Image, caption: str, quality: int = 90) -> None:
        image.save(folder / name, quality=quality)
        (folder / name).with_suffix(".txt").write_text(caption)

    first, second = read_rgb(folder / "00.png"), read_rgb(folder / "01.png")
    put("black.png", Image.new("RGB", (800, 700)), "zwx, night")
    put("bars.png", ImageOps.expand(second.crop((100, 150, 700, 500)), (0, 120), "black"), "zwx, film")
    put("blurred.png", ImageOps.flip(first).filter(ImageFilter.GaussianBlur(5)), "zwx, soft")
    put("blocks.png", jpeg(ImageOps.flip(second).resize((560, 560)), 15), "zwx, blocky")
    put("poor.jpg", read_rgb(folder / "02.png").rotate(90), "zwx, poor", quality=20)
    put("small.png", read_rgb(folder / "03.png").rotate(90).resize((200, 200)), "zwx, small")
    put("dark.png", read_rgb(folder / "04.png").rotate(90).point([level // 6 for level in range(256)] * 3), "zwx, dark")
    put("mirrored.png", ImageOps.mirror(read_rgb(folder / "05.png")).resize((600, 600)), "zwx, mirrored")
    shutil.copy(folder / "06.png", folder / "copy.png")
    (folder / "cut.jpg").write_bytes((folder / "poor.jpg").read_bytes()[:2000])
    done = checkup_of(folder, str(sd15), trigger="zwx")
    assert {check: {Path(path).name for path in one.details} for one in done.findings if (check := one.check)} == {
        "left out": {"cut.jpg"}, "blank image": {"black.png"}, "borders": {"bars.png"}, "blur": {"blurred.png"},
        "JPEG artifacts": {"blocks.png", "poor.jpg"}, "low resolution": {"small.png"}, "exposure": {"dark.png"},
        "duplicate image": {"05.png", "mirrored.png"}, "duplicate file": {"06.png", "copy.png"},
        "no caption": {"copy.png"}, "missing trigger": {"copy.png"},
    }  # fmt: skip
    assert problems(done)["blank image"] == "serious" and done.is_serious
    assert [one.severity for one in done.findings] == sorted(
        (one.severity for one in done.findings), key=["serious", "warning", "note"].index
    )


def test_a_problem_in_over_a_third_of_the_images_is_serious(tmp_path: Path, sd15: Path):
    copied(tmp_path / "set", STYLE)
    assert problems(checkup_of(tmp_path / "set", str(sd15))) == {"low resolution": "serious"}
    assert problems(checkup_of(tmp_path / "set", str(sd15), resolution=256)) == {}


def test_the_minimum_number_of_images_depends_on_the_kind(tmp_path: Path):
    folder = copied(tmp_path / "set", STYLE[:4])
    assert problems(checkup_of(folder, kind="style"))["few images"] == "serious"
    assert problems(checkup_of(folder, kind="character"))["few images"] == "warning"


def test_captions_are_checked_against_the_token_limit_of_the_base(tmp_path: Path, sd15: Path):
    folder = copied(tmp_path / "set", STYLE)
    stems = [path.stem for path in STYLE]
    words = " ".join(f"word{number}" for number in range(60))
    (folder / f"{stems[0]}.txt").write_text(f"{words}, zwx")
    (folder / f"{stems[1]}.txt").write_text("")
    (folder / f"{stems[2]}.txt").unlink()
    for stem in stems[3:5]:
        (folder / f"{stem}.txt").write_text("zwx, two alike")
    (folder / f"{stems[5]}.txt").write_text("zwx, soft light, blue eyes, a hat, sitting, white shirt")
    (folder / f"{stems[6]}.txt").write_text("zwx, soft-light, blue eye, a hat, sitting, white skirt")
    done = checkup_of(folder, str(sd15), resolution=256, trigger="zwx")
    found = {one.check: one for one in done.findings}
    assert set(problems(done)) == {"long caption", "no caption", "duplicate caption", "spelling variants"}
    assert found["long caption"].severity == "serious" and "the trigger is cut off" in found["long caption"].what
    assert "ignored: “28 word29 word30" in next(iter(found["long caption"].details.values()))
    assert sorted(found["no caption"].details.values()) == ["no caption", "the caption file is empty"]
    assert {Path(path).stem for path in found["duplicate caption"].details} == set(stems[3:5])
    assert "“soft light” (1) and “soft-light” (1)" in found["spelling variants"].what
    assert "“blue eyes” (1) and “blue eye” (1)" in found["spelling variants"].what
    assert "skirt" not in found["spelling variants"].what


def test_a_dataset_without_captions_is_serious_and_a_character_needs_a_trigger(tmp_path: Path):
    folder = copied(tmp_path / "set", CAT)
    for number, path in enumerate(sorted(folder.glob("*.txt"))):
        path.write_text(f"cat number {'abcdefghi'[number]}")
    assert problems(checkup_of(folder, kind="character")) == {"no trigger": "warning"}
    assert problems(checkup_of(folder, kind="character", trigger="zwx")) == {}
    for path in folder.glob("*.txt"):
        path.unlink()
    assert problems(checkup_of(folder, kind="character"))["no caption"] == "serious"
    assert problems(checkup_of(folder, kind="character", trigger="zwx"))["no caption"] == "warning"


def test_the_frame_is_the_training_crop(tmp_path: Path):
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (50, 0, 250, 100))
    wide.save(tmp_path / "wide.png")
    done = checkup_of(tmp_path, max_bucket_reso=64)
    frame = frame_of(done.measures[0].crop)
    assert (frame.left, frame.top, frame.width, frame.height) == pytest.approx((16.7, 0, 66.7, 100), abs=0.1)
    colors = np.asarray(sheet(done, "wide", "sketch")).reshape(-1, 3).astype(int)
    assert ((colors[:, 2] > 240) & (colors[:, 0] < 20)).any()  # the part inside the crop
    assert not ((colors[:, 0] > 240) & (colors[:, 2] < 60)).any()  # the cropped-off part is faded


class Links(HTMLParser):
    """Collects the URLs and the tags of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.urls: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.urls += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_page_is_self_contained_and_escapes_names_and_captions(tmp_path: Path):
    folder = copied(tmp_path / "set", STYLE[:3], caption="zwx, <script>alert(1)</script> & <img src=x>")
    (folder / f"{STYLE[0].stem}.webp").rename(folder / '"><script>boo<.webp'.replace("/", ""))
    Image.new("L", (256, 256), 0).save(folder / f"{STYLE[1].stem}-masklabel.png")
    mask = Image.new("L", (256, 256), 0)
    mask.paste(255, (60, 60, 200, 200))
    mask.save(folder / f"{STYLE[2].stem}-masklabel.png")
    text = page(checkup_of(folder, trigger="zwx"), "<b>set", "sketch", "zwx")
    links = Links(text)
    assert links.urls and all(url.startswith(("data:image/", "#p")) for url in links.urls)
    assert "script" not in links.tags and "b" in links.tags  # "What to do" is bold
    assert not re.search(r"url\(|@import|https?:", text.replace("http-equiv", ""))
    assert "<mark>zwx</mark>" in text and "&lt;b&gt;set" in text
    assert text.count("data:image/png") == 1  # the mask that is not fully black


def test_for_a_large_dataset_images_with_rare_problems_are_shown(tmp_path: Path):
    folder = copied(tmp_path / "set", STYLE)
    read_rgb(STYLE[15]).filter(ImageFilter.GaussianBlur(12)).save(folder / STYLE[15].name)
    done = checkup_of(folder, resolution=512)
    assert problems(done) == {"low resolution": "serious", "blur": "warning"}
    assert [number for number, _ in shown_of(done, 4)] == [0, 1, 2, 15]


def test_the_check_command_writes_a_page_and_a_contact_sheet_and_sets_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    cli.main(["check", str(SAMPLES / "clay-style"), "--trigger", "clay style"])
    assert "Ready to train" in capsys.readouterr().out
    assert (tmp_path / "check/clay-style-check.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with Image.open("check/clay-style-check.jpg") as image:
        image.load()
        assert image.width > 1000
    (tmp_path / "set").mkdir()
    Image.new("RGB", (99, 99)).save(tmp_path / "set/black.png")
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", "set", "--json", "--no-page"])
    assert stop.value.code == 65
    report = json.loads(capsys.readouterr().out)
    assert report["serious"] and report["facts"]["images"] == 1 and report["written"] == []
    assert {one["check"] for one in report["findings"]} <= {check.name for check in CHECKS}
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", str(SAMPLES / "clay-cat"), "--out", str(tmp_path / "file")])
    assert stop.value.code == 73
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", str(tmp_path)])
    assert stop.value.code == 2 and "would be trained on" in capsys.readouterr().err


def test_a_run_checks_its_dataset_before_loading_anything_and_continues_regardless(tmp_path: Path):
    Image.new("RGB", (99, 99)).save(tmp_path / "black.png")
    events: list[dict] = []
    options = files.resolve(flags={"data": {"images": str(tmp_path)}, "machine": {"device": "cpu"}})
    train(options, [events.append], dry_run=True)
    (event,) = [event for event in events if event["kind"] == "checkup"]
    assert "  serious: 1 blank image (a single solid color)" in event["text"]
    assert event["findings"][0]["severity"] == "serious"
    assert json.loads(json.dumps(event, allow_nan=False))


def test_every_character_of_a_contact_sheet_is_in_its_font(monkeypatch: pytest.MonkeyPatch):
    for text in ("Fuchs – ärger", "plain", "熊の絵 ß"):
        shown, font = fonts.lettered(text, 16)
        assert all(character.isspace() or drawn(character, font) != drawn("\uffff", font) for character in shown)
        assert len(shown) == len(text) and (shown == text or not text.isascii())
    assert fonts.lettered("ü\uffff", 16)[0] == fonts.lettered("ü", 16)[0] + "?"
    monkeypatch.setattr(fonts, "SYSTEM", ())
    texts = ["Fuchs – ärger", "熊の絵, é", "고양이"]
    assert [fonts.lettered(text, 16)[0] for text in texts] == ["Fuchs - arger", "???, e", "???"]


def test_every_left_out_file_and_every_remark_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "set"
    shutil.copytree(SAMPLES / "clay-style", folder)
    for number in range(9):
        (folder / f"broken-{number}.png").write_bytes(b"")
    (folder / "metadata.csv").write_text("file_name,text\ngone.png,no file\nalso-gone.png,no file\n")
    (folder / "fox.txt").write_text("a fox, " + "far and away " * 60)
    cli.main(["check", str(folder), "--no-page"])
    output = capsys.readouterr().out
    assert all(f"broken-{number}.png: cannot be read as an image (the file is empty)" in output for number in range(9))
    assert "2 remarks on files that are used" in output and "gone.png" in output and "also-gone.png" in output
    assert "…”" in output and output.count("far and away") < 10


def test_a_list_of_folders_is_checked_like_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "set.toml").write_text(f'[[folders]]\npath = "{SAMPLES / "clay-style"}"\n')
    cli.main(["check", str(tmp_path / "set.toml"), "--no-page"])
    assert "20 images" in capsys.readouterr().out


def test_long_names_and_words_are_truncated_to_fit():
    font = ImageFont.load_default(16)
    lines = wrapped("word " * 40 + "x" * 400, font, 200, 3)
    assert len(lines) == 3 and all(font.getlength(line) <= 200 for line in lines) and lines[-1].endswith("…")
