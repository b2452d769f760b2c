"""Previews: images equal to those of stock diffusers in any batch, labeled grids, prompts, and adapter comparisons."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image
from tiny import tiny_base

from scumble.configs.errors import Refused
from scumble.configs.options import Model, Network, Previews
from scumble.trainer import cli
from scumble.trainer.adapters.adapter import Adapter, read_adapter
from scumble.trainer.adapters.applied import applied
from scumble.trainer.adapters.files import write_adapter
from scumble.trainer.adapters.keys import text_key, unet_key
from scumble.trainer.adapters.targets import Part
from scumble.trainer.base_model.detect import EMBEDDED, detect_base
from scumble.trainer.base_model.load import Base, load
from scumble.trainer.kernels.capture import Replay
from scumble.trainer.previews import compare, grid
from scumble.trainer.previews.prompts import PreviewPrompt, preview_prompts, prompts_from_captions
from scumble.trainer.previews.sampling import SAMPLERS, render
from scumble.trainer.training.export import export
from scumble.trainer.training.lora import attach

PROMPTS_OF_THREE_SHAPES = ("cat", 64, 4.0), ("dog", 64, 4.0), ("cat", 96, 4.0), ("cat", 64, 1.0)
PROMPT = PreviewPrompt("owl, flat style", "", None, None, seed=3, num_inference_steps=3, guidance_scale=4.0)


def loaded(model: Model) -> Base:
    return load(model, detect_base(model), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def base() -> Base:
    return loaded(Model())


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def test_a_preview_equals_the_image_of_stock_diffusers(base: Base):
    stock = StableDiffusionPipeline.from_pretrained(EMBEDDED)
    expected = stock(
        "owl", num_inference_steps=5, guidance_scale=4.0, negative_prompt="cat", generator=torch.manual_seed(3)
    ).images[0]
    prompt = replace(PROMPT, prompt="owl", negative_prompt="cat", num_inference_steps=5)
    image = render(base, [prompt], "ddim")[0]
    assert np.abs(pixels(image) - pixels(expected)).max() <= 1


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_base_in_fp16_decodes_with_its_vae_in_fp32(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    model = Model(base=str(tiny_base(kind, tmp_path)))
    images = {}
    for dtype in (torch.float32, torch.float16):
        base = load(model, detect_base(model), torch.device("cpu"), dtype)
        assert base.unet.dtype == dtype and base.vae.dtype == torch.float32
        (image,) = render(base, [PreviewPrompt("cat", "", 64, 64, 3, 2, 4.0)], "ddim")
        images[dtype] = pixels(image)
    assert np.abs(images[torch.float16].astype(int) - images[torch.float32]).max() <= 8
    assert "float16" not in capfd.readouterr().err


def test_a_prompt_gives_the_same_image_alone_and_in_a_batch_with_any_sizes(base: Base):
    words = ("cat", "dog", "car", "bus", "owl", "bee", "fox", "pie", "key")
    prompts = [replace(PROMPT, prompt=f"{word}, flat style", seed=seed) for seed, word in enumerate(words)]
    prompts.insert(4, replace(PROMPT, width=48, height=64))
    together = render(base, prompts, "ddim")
    alone = render(base, prompts[9:], "ddim")
    assert [image.size for image in together].count((48, 64)) == 1 and together[4].size == (48, 64)
    assert np.abs(pixels(together[9]) - pixels(alone[0])).max() <= 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_renders_and_the_base_keeps_its_own_scheduler(sampler: str, base: Base):
    own = base.pipeline.scheduler
    image = render(base, [replace(PROMPT, num_inference_steps=12)], sampler)[0]
    assert base.pipeline.scheduler is own
    assert np.isfinite(pixels(image)).all() and pixels(image).std() > 5


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_captured_calls_give_the_same_images(kind: str, tmp_path: Path):
    """The capture replays on the same memory, as a CUDA graph does."""
    small = loaded(Model(base=str(tiny_base(kind, tmp_path))))
    prompts = [
        replace(PROMPT, prompt=word, width=64, height=side, guidance_scale=scale)
        for word, side, scale in PROMPTS_OF_THREE_SHAPES
    ]
    runs = []

    def capture(run: Replay) -> Replay:
        runs.append(run())
        result = torch.empty_like(runs[-1])
        return lambda: result.copy_(run())

    for sampler in SAMPLERS:
        runs.clear()
        captured = render(small, prompts, sampler, pytest.fail, capture)
        assert len(runs) == 3 and captured == render(small, prompts, sampler)
    assert "forward" not in vars(small.unet)


def test_calls_run_without_capture_if_memory_runs_out(base: Base):
    def refused(run: Replay) -> Replay:
        raise torch.OutOfMemoryError("no room")

    prompts = [PROMPT, replace(PROMPT, seed=4)]
    assert render(base, prompts, "ddim", pytest.fail, refused) == render(base, prompts, "ddim")


def test_large_batches_are_not_captured(base: Base):
    def refused(run: Replay) -> Replay:
        pytest.fail("captured")

    render(base, [replace(PROMPT, seed=seed) for seed in range(5)], "ddim", pytest.fail, refused)


def test_model_options_reach_the_scheduler():
    scheduler = loaded(Model(prediction_type="v_prediction", zero_terminal_snr=True)).pipeline.scheduler
    assert scheduler.config["prediction_type"] == "v_prediction"
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(0, abs=1e-6)


def test_zero_terminal_snr_is_refused_on_epsilon():
    with pytest.raises(Refused, match="--zero-terminal-snr: requires a v-prediction base"):
        detect_base(Model(zero_terminal_snr=True))


def test_the_vae_option_replaces_the_vae(tmp_path: Path, base: Base):
    with pytest.raises(Refused, match=r"--vae .*: not a file or a diffusers VAE folder"):
        loaded(Model(vae=str(tmp_path)))
    assert loaded(Model(vae=str(EMBEDDED / "vae"))).vae is not base.vae


def test_a_grid_places_every_image_with_room_for_its_label():
    red, green, blue = (Image.new("RGB", (64, 48), color) for color in ("red", "green", "blue"))
    long = "a label that is much too long for its image"
    sheet = grid.grid([[red, green], [blue]], [["one", long], ["three"]])
    gap, line_px = grid.GAP_PX, int(11 * 1.7)
    assert sheet.size == (2 * (64 + gap) + gap, 2 * (48 + line_px + gap) + gap + 2 * line_px)  # a label of three lines
    top = gap + 3 * line_px
    assert sheet.getpixel((gap, top)) == (255, 0, 0)
    assert sheet.getpixel((2 * gap + 64, top)) == (0, 128, 0)
    assert sheet.getpixel((gap, top + 48 + gap + line_px)) == (0, 0, 255)
    label = np.asarray(sheet.crop((gap, top - line_px, gap + 64, top)))  # a short label directly above its image
    assert label.min() < 100  # text pixels
    between = np.asarray(sheet.crop((64 + gap, 0, 64 + 2 * gap, sheet.height)))
    assert between.min() == 255  # a long label does not overlap the next one


def test_long_labels_are_wrapped_at_words_and_only_the_last_line_is_shortened():
    def lines(label: str) -> list[str]:
        return grid.wrapped(label, 11, 128)[0]

    assert lines("owl, clay style") == ["owl, clay style"] and lines("") == [""]
    long = "photo of a woman, clay style, in a garden by the sea at dusk"
    assert " ".join(lines(long)) == long and 1 < len(lines(long)) <= grid.MAX_LABEL_LINES
    longer = lines(f"{long}, {long}")
    assert len(longer) == grid.MAX_LABEL_LINES and longer[:2] == lines(long)[:2] and longer[2].endswith("…")
    assert lines("x" * 90)[0].endswith("…")


def test_grid_rows_have_their_label_on_the_left():
    red = Image.new("RGB", (64, 48), "red")
    sheet = grid.grid([[red], [red]], [["prompt"], []], ["before", "epoch 12"])
    left = np.asarray(sheet.crop((0, 0, sheet.width - 64 - 2 * grid.GAP_PX, sheet.height)))
    assert left.min() < 100 and sheet.getpixel((sheet.width - 20, 40)) == (255, 0, 0)


def test_prompts_come_from_options_then_from_the_file_without_comments(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# three\n\ntiger\n  Bär, flat style \n#owl\n".encode())
    prompts = preview_prompts(Previews(prompts=("first",), prompt_file=str(path), preview_seed=5), 64, [], 7.0)
    assert [prompt.prompt for prompt in prompts] == ["first", "tiger", "Bär, flat style"]
    assert [prompt.seed for prompt in prompts] == [5, 6, 7]
    assert {(prompt.width, prompt.height, prompt.guidance_scale) for prompt in prompts} == {(64, 64, 7.0)}


def test_kohya_prompt_lines_are_parsed():
    line = "a cat, sitting --n blurry, low quality --w 515 --h 768 --d 42 --s 30 --l 6.5"
    (prompt,) = preview_prompts(Previews(prompts=(line,)), 64, [], 7.0)
    assert prompt == PreviewPrompt("a cat, sitting", "blurry, low quality", 512, 768, 42, 30, 6.5)
    with pytest.raises(Refused, match="invalid value for --w, --h, --d, --s or --l; use a number"):
        preview_prompts(Previews(prompts=("a cat --w wide",)), 64, [], 7.0)


def test_derived_prompts_are_three_captions_and_an_unrelated_subject_with_their_tags():
    captions = [f"{subject}, clay style" for subject in ("fox", "tiger", "house", "owl", "tulip")]
    assert prompts_from_captions(captions) == [
        "fox, clay style",
        "house, clay style",
        "tulip, clay style",
        "castle, clay style",
    ]
    assert prompts_from_captions(["clay cat, crying", "clay cat, smiling"])[-1] == "clay cat, tiger"
    assert prompts_from_captions([""])[-1] == "tiger"
    framed = [f"photo of {caption}, on white" for caption in captions]
    assert prompts_from_captions(framed, "photo of", ", on white") == [
        *(f"photo of {subject}, clay style, on white" for subject in ("fox", "house", "tulip", "castle"))
    ]


def test_invalid_paths_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def refused(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(["preview", "--num-inference-steps", "1", "--prompts", "a", *arguments])
        return int(stop.value.code or 0), capsys.readouterr().err

    (tmp_path / "there.png").write_bytes(b"mine")
    (tmp_path / "empty").mkdir()
    assert refused("--out", f"{tmp_path}/there.png") == (
        2,
        f"scumble: --out {tmp_path}/there.png: file exists; choose another name, or use --force to overwrite it\n",
    )
    assert (tmp_path / "there.png").read_bytes() == b"mine"
    assert refused("--base", "./nowhere", "--out", f"{tmp_path}/a.png")[0] == 2
    assert "model_index.json" in refused("--base", f"{tmp_path}/empty", "--out", f"{tmp_path}/a.png")[1]
    code, line = refused("--out", f"{tmp_path}/there.png/a.png")
    assert code == 73 and "cannot be written" in line
    assert refused("--out", f"{tmp_path}/a.txt")[1].endswith("a.txt: must end in .png\n")
    assert "--strengths: only with adapter files" in refused("--strengths", "1", "--out", f"{tmp_path}/a.png")[1]
    assert (
        "--strengths: give at least one value; if the first one starts with a minus sign, write --strengths=-0.5,1"
        in (refused("--strengths", "-1,0", "--out", f"{tmp_path}/a.png")[1])
    )
    assert refused("--prompt-file", f"{tmp_path}/none.txt", "--out", f"{tmp_path}/a.png")[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "there.png"]


def test_the_command_writes_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "new" / "grid.png"
    cli.main(["preview", "--prompts", "tiger", "--prompts", "owl", "--num-inference-steps", "2", "--out", str(out)])
    assert Image.open(out).width > 2 * 128
    assert str(out) in capsys.readouterr().out


def random_adapter(path: Path, **metadata: str) -> Path:
    """Random factors of rank 2 and alpha 1 on the attention layers of the embedded base and its text encoder."""
    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED)
    layers = {unet_key(name, sgm=False): layer for name, layer in pipeline.unet.named_modules() if ".to_" in name}
    for name, layer in pipeline.text_encoder.named_modules():
        layers |= {text_key(name, "lora_te"): layer} if name.endswith("_proj") else {}
    generator, tensors = torch.Generator().manual_seed(0), {}
    for stem, layer in layers.items():
        if isinstance(layer, torch.nn.Linear):
            tensors[f"{stem}.lora_down.weight"] = 0.5 * torch.randn(2, layer.in_features, generator=generator)
            tensors[f"{stem}.lora_up.weight"] = 0.5 * torch.randn(layer.out_features, 2, generator=generator)
            tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    write_adapter(tensors, {"ss_base_model_version": "sd_v1"} | metadata, path)
    return path


def test_strengths_equal_those_of_stock_diffusers_and_the_base_is_restored(tmp_path: Path):
    base, prompts = loaded(Model()), [replace(PROMPT, guidance_scale=1.5, num_inference_steps=2)]
    file = random_adapter(tmp_path / "it.safetensors")
    plain = render(base, prompts, "ddim")[0]
    zero, half, full = (
        row[0] for row in compare.render_strengths(base, file, read_adapter(file), prompts, [0, 0.5, 1], "ddim")
    )
    assert np.array_equal(pixels(zero), pixels(plain))
    stock = StableDiffusionPipeline.from_pretrained(EMBEDDED)
    stock.load_lora_weights(str(file))
    for strength, image in ((0.5, half), (1.0, full)):
        stock.set_adapters("default_0", strength)
        expected = stock(
            PROMPT.prompt, num_inference_steps=2, guidance_scale=1.5, negative_prompt="", generator=torch.manual_seed(3)
        ).images[0]
        assert np.abs(pixels(image) - pixels(expected)).max() <= 1
        assert np.abs(pixels(image) - pixels(plain)).max() > 8
    assert np.array_equal(pixels(render(base, prompts, "ddim")[0]), pixels(plain))


def test_an_adapter_can_be_applied_to_a_base_on_another_device(tmp_path: Path):
    base = loaded(Model())
    base.unet.to("meta")  # like any device, it rejects tensors of other devices
    with applied(base, read_adapter(random_adapter(tmp_path / "it.safetensors")), 0.5):
        assert {weight.device.type for weight in base.unet.parameters()} == {"meta"}


@pytest.mark.parametrize("network", ["dora", "loha", "lokr"])
def test_kinds_that_diffusers_cannot_load_render_as_the_live_adapter_does(network: str, tmp_path: Path):
    base, prompts = loaded(Model()), [replace(PROMPT, guidance_scale=1.5, num_inference_steps=2)]
    plain = render(base, prompts, "ddim")[0]
    live = loaded(Model())
    settings = Network.model_validate({"algorithm": network, "targets": "full", "lokr_factor": 4})
    trained = attach(live, settings, [Part("unet", 4, 8.0, 2, 2.0), Part("text", 2, 2.0)], seed=0)
    generator = torch.Generator().manual_seed(0)
    for module in trained:
        for slot, parameter in module.tensors.items():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data += noise * parameter.data if slot == "dora_scale" else noise
    file = tmp_path / "it.safetensors"
    export(file, trained, {}, torch.float32)
    zero, full = (
        row[0] for row in compare.render_strengths(base, file, read_adapter(file), prompts, [0, 1], "ddim")
    )  # fmt: skip
    assert np.array_equal(pixels(zero), pixels(plain))
    assert np.abs(pixels(full) - pixels(render(live, prompts, "ddim")[0])).max() <= 2
    assert np.abs(pixels(full) - pixels(plain)).max() > 8
    assert np.array_equal(pixels(render(base, prompts, "ddim")[0]), pixels(plain))


def test_each_row_is_a_file_at_a_strength_and_each_column_a_prompt(tmp_path: Path):
    file = random_adapter(tmp_path / "it.safetensors", ss_sd_model_name="sketch")
    again = tmp_path / "b" / "it.safetensors"
    again.parent.mkdir()
    again.write_bytes(file.read_bytes())
    out = tmp_path / "grid.png"
    prompts = ["--prompts", "tiger", "owl", "--prompts", "car"]
    cli.main(["preview", str(file), str(again), *prompts, "--strengths", "1,0", "2", "--num-inference-steps", "1",
              "--out", str(out)])  # fmt: skip
    sheet, side = Image.open(out).convert("RGB"), 128 + grid.GAP_PX
    margin = sheet.width - 3 * side - grid.GAP_PX
    top = sheet.height - 5 * side - grid.GAP_PX  # height of the prompts above the columns
    assert margin > 40 and 11 < top < 40
    rows = [np.asarray(sheet.crop((margin, top + side * row, sheet.width, top + side * (row + 1)))) for row in range(5)]
    assert np.array_equal(rows[1], rows[3]) and np.array_equal(rows[2], rows[4])  # the same file under two names
    assert not any(np.array_equal(rows[one], rows[other]) for one, other in ((0, 1), (0, 2), (1, 2)))
    cli.main(["preview", *prompts, "--num-inference-steps", "1", "--out", str(tmp_path / "base.png")])
    plain = Image.open(tmp_path / "base.png").convert("RGB")
    assert np.array_equal(
        rows[0][:side, : plain.width], np.asarray(plain)[top : top + side]
    )  # strength 0 is the base, rendered once
    assert compare.names_of([file, again])[1] == "b/it"
    assert len(compare.names_of([Path("x" * 90 + ".safetensors")])[0]) == compare.MAX_LABEL_LENGTH


def test_default_prompts_use_the_trigger_words_of_the_adapters():
    tags = json.dumps({"a": {"owl": 1, "clay style": 3}, "b": {"clay style": 2, "tree": 2}})
    metadata = [
        {"modelspec.trigger_phrase": "zwx --w 9\x1b"},
        {"ss_tag_frequency": tags},
        {},
        {"ss_tag_frequency": "{"},
    ]
    assert [compare.words_of(Adapter({}, entries)) for entries in metadata] == ["zwx  w 9", "clay style", "", ""]
    assert compare.words_of(Adapter({}, {"ss_tag_frequency": json.dumps({"a": {"owl": 1, "tree": 1}})})) == ""
    twice = [Adapter({}, metadata[1])] * 2
    assert compare.prompts_of(twice) == ["clay style", "red apple, clay style", "castle, clay style"]
    assert compare.prompts_of([Adapter({})]) == ["red apple", "castle"]
    assert compare.strengths_of(["1,0.5", "1"]) == [1, 0.5]


def test_invalid_comparisons_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def refused(file: Path, *arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main(["preview", str(file), "--prompts", "a", "--out", str(tmp_path / "no.png"), *arguments])
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.count("\n") == 1
        return line

    other = tmp_path / "other.safetensors"
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    parts = {f"{stem}.lora_down.weight": torch.ones(2, 2048), f"{stem}.lora_up.weight": torch.ones(8, 2)}
    write_adapter(parts, {"ss_sd_model_name": "my-xl.safetensors"}, other)
    assert "was trained on my-xl.safetensors; name the base with --base FILE" in refused(other)
    assert "made for sdxl, but --base sketch is sd1; use a base of the same family" in refused(
        other, "--base", "sketch"
    )
    assert "--strengths 0,x: must be numbers" in refused(other, "--strengths", "0,x")
    assert "--strengths nan: must be numbers" in refused(other, "--strengths", "nan")
    assert f"--prompts {other}: is a file, not a prompt" in refused(other, "--prompts", "a", str(other))
    write_adapter({f"{stem}.lokr_w1": torch.ones(2, 2), f"{stem}.lokr_w2": torch.ones(2, 2)}, {}, other)
    assert "does not name its base" in refused(other)
    assert "attn2.to_k is 4 x 4, but the base's layer is 128 x 192; this adapter was" in refused(
        other, "--base", "sketch"
    )
    assert not (tmp_path / "no.png").exists()
