"""Which UIs find a home for which keys, on the real layouts; whether stock diffusers computes what a file says."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from layouts import LAYOUTS, OTHERS
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from tiny import CONFIGS, tiny_base
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from scumble.configs.options import Model, Network
from scumble.trainer import cli
from scumble.trainer.adapters.adapter import from_tensors, to_tensors
from scumble.trainer.adapters.forward_check import output_of
from scumble.trainer.adapters.keys import ModulePath, kohya_stem
from scumble.trainer.adapters.targets import ATTENTION, CONVS, FULL, TEXT, Part
from scumble.trainer.adapters.ui_keys import matches
from scumble.trainer.adapters.verify import verify
from scumble.trainer.adapters.weights import find_weights
from scumble.trainer.base_model.detect import EMBEDDED, detect_base
from scumble.trainer.base_model.load import load
from scumble.trainer.training.export import export
from scumble.trainer.training.lora import attach

SLOTS = ("lora_down.weight", "lora_up.weight", "alpha")


@cache
def modules(family: str) -> dict[str, list[str]]:
    """Names of the layers as diffusers and transformers have them, by part of a pipeline."""
    folder = CONFIGS / LAYOUTS[family]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((folder / "unet/config.json").read_text()))
        parts: dict[str, torch.nn.Module] = {"unet": unet}  # ty: ignore[invalid-assignment]
        parts["text_encoder"] = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        if family == "sdxl":
            config = CLIPTextConfig.from_pretrained(folder / "text_encoder_2")
            parts["text_encoder_2"] = CLIPTextModelWithProjection(config)
    return {part: [name for name, _ in model.named_modules()] for part, model in parts.items()}


def chosen(family: str, unet: str = ATTENTION) -> list[tuple[str, str]]:
    """(part, module name) of what is adapted: the UNet's layers that a regex names, all of the text encoders'."""
    return [
        (part, name)
        for part, names in modules(family).items()
        for name in names
        if re.fullmatch(unet if part == "unet" else TEXT, name)
    ]


def place_of(part: str, name: str) -> ModulePath:
    component = {"unet": "unet", "text_encoder": "text", "text_encoder_2": "text2"}[part]
    return ModulePath(component, name.removeprefix("text_model."))


def layout(family: str) -> list[ModulePath]:
    return [place_of(part, name) for part, name in chosen(family, f"{FULL}|{CONVS}|{OTHERS}")]


def shapes(base: Path) -> dict[ModulePath, tuple[int, ...]]:
    return {place: spot.shape for place, spot in find_weights(base).spots.items()}


def shares(names: list[str], family: str) -> dict[str, int]:
    return {match.ui: match.matched for match in matches(names, layout(family), family)}


@pytest.mark.parametrize(("family", "total"), [("sd1", 200), ("sd2", 128 + 138), ("sdxl", 824)])
def test_kohyas_names_as_we_write_them_have_a_home_in_every_ui(family: str, total: int):
    names = [f"{kohya_stem(place_of(*entry), family)}.{slot}" for entry in chosen(family) for slot in SLOTS]
    assert shares(names, family) == dict.fromkeys(("ComfyUI", "A1111", "Forge", "InvokeAI", "diffusers"), total)


@pytest.mark.parametrize(("family", "total"), [("sd1", 278 + 72), ("sd2", 278 + 138), ("sdxl", 788 + 264)])
def test_so_have_all_layers_with_convolutions(family: str, total: int):
    entries = chosen(family, f"{FULL}|{CONVS}")
    names = [f"{kohya_stem(place_of(*entry), family)}.{slot}" for entry in entries for slot in SLOTS]
    assert set(shares(names, family).values()) == {total} and len(entries) == total


@pytest.mark.parametrize(("family", "comfyui", "total"), [("sd1", 0, 200), ("sdxl", 192, 824)])
def test_names_that_diffusers_saves_are_lost_on_the_uis(family: str, comfyui: int, total: int):
    names = [f"{part}.{name}.lora_{end}.weight" for part, name in chosen(family) for end in "AB"]
    found = shares(names, family)
    assert found == {"ComfyUI": comfyui, "A1111": 0, "Forge": 0, "InvokeAI": 0, "diffusers": total}
    assert {match.ui for match in matches(names, layout(family), family) if match.refusal} == {"Forge", "InvokeAI"}


@pytest.mark.parametrize(("family", "most"), [("sd1", 128), ("sdxl", 752)])
def test_diffusers_own_conversion_loses_the_first_text_encoder(family: str, most: int):
    peft = {f"{part}.{name}.lora_{end}.weight": torch.ones(2, 2) for part, name in chosen(family) for end in "AB"}
    found = shares(list(convert_state_dict_to_kohya(peft)), family)
    assert (found["ComfyUI"], found["A1111"], found["Forge"], found["InvokeAI"]) == (most, most, 0, most)


def test_diffusers_block_names_lose_three_modules_of_sdxl_in_a1111():
    names = [
        f"lora_unet_{name.replace('.', '_')}.{slot}"
        for part, name in chosen("sdxl", f"{FULL}|{CONVS}|{OTHERS}") if part == "unet"
        for slot in SLOTS
    ]  # fmt: skip
    lost = {match.ui: match.lost for match in matches(names, layout("sdxl"), "sdxl")}
    assert lost["A1111"] == (
        "lora_unet_add_embedding_linear_1",
        "lora_unet_add_embedding_linear_2",
        "lora_unet_up_blocks_0_upsamplers_0_conv",
    )
    assert not lost["ComfyUI"] and len(lost["diffusers"]) == 2


def test_te1_is_ignored_by_invokeai_on_sd1_and_forge_turns_away_above_twelve():
    stems = ["lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_mid_block_attentions_0_proj_in"]
    names = [f"{stem}.{slot}" for stem in stems for slot in SLOTS]
    assert shares(names, "sd1") == {"ComfyUI": 2, "A1111": 2, "Forge": 2, "InvokeAI": 1, "diffusers": 2}
    for number, forge in ((12, 2), (13, 0)):
        unknown = [f"lora_unet_nonsense_{index}.alpha" for index in range(number)]
        assert shares(names + unknown, "sd1")["Forge"] == forge


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_layout_of_a_base_is_that_of_its_modules(kind: str, tmp_path: Path):
    folder = tiny_base(kind, tmp_path)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    assert isinstance(unet, UNet2DConditionModel)
    found = shapes(folder)
    expected = {
        name: tuple(layer.weight.shape) for name, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    }  # fmt: skip
    assert {place.path: shape for place, shape in found.items() if place.component == "unet"} == expected
    assert sum(place.component != "unet" for place in found) == 2 * 6 * (2 if kind == "sdxl" else 1)
    assert found[ModulePath("text", "encoder.layers.1.mlp.fc1")] == (64, 32)


def test_a_single_file_has_the_same_layout_as_the_folder(tmp_path: Path):
    """Names as the checkpoints of SD 2 and SDXL have them: sgm's UNet, open_clip's fused projections."""
    zero = torch.zeros
    save_file(
        {
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": zero(16, 32),
            "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": zero(16, 8, 3, 3),
            "model.diffusion_model.input_blocks.1.0.in_layers.0.weight": zero(8),
            "model.diffusion_model.output_blocks.2.1.conv.weight": zero(8, 8, 3, 3),
            "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": zero(64, 32),
            "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": zero(9, 32),
            "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight": zero(96, 32),
            "conditioner.embedders.1.model.transformer.resblocks.3.mlp.c_proj.weight": zero(32, 64),
        },
        tmp_path / "x.safetensors",
    )
    assert shapes(tmp_path / "x.safetensors") == {
        ModulePath("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"): (16, 32),
        ModulePath("unet", "down_blocks.0.resnets.0.conv1"): (16, 8, 3, 3),
        ModulePath("unet", "up_blocks.0.upsamplers.0.conv"): (8, 8, 3, 3),
        ModulePath("text", "encoder.layers.0.mlp.fc1"): (64, 32),
        **{ModulePath("text2", f"encoder.layers.3.self_attn.{name}_proj"): (32, 32) for name in "qkv"},
        ModulePath("text2", "encoder.layers.3.mlp.fc2"): (32, 64),
    }


def factors(folder: Path, text: str, unet: str = r".*\.attn2\.to_[qv]|.*\.conv1") -> dict[str, torch.Tensor]:
    """Random factors, under kohya's names, on chosen layers of a tiny base."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for place, shape in shapes(folder).items():
        if re.fullmatch(unet if place.component == "unet" else text, place.path):
            stem = kohya_stem(place, "sdxl" if (folder / "text_encoder_2").exists() else "sd1")
            ones = (1,) * (len(shape) - 2)
            tensors[f"{stem}.lora_down.weight"] = 0.3 * torch.randn(2, *shape[1:], generator=generator)
            tensors[f"{stem}.lora_up.weight"] = 0.3 * torch.randn(shape[0], 2, *ones, generator=generator)
            tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    return tensors


def verified(file: Path, base: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = 0
    try:
        cli.main(["adapter", "verify", str(file), "--base", str(base), *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, " ".join(capsys.readouterr().out.split())


def test_the_embedded_base_has_a_layout_too():
    found = shapes(EMBEDDED)
    assert {place.component for place in found} == {"unet", "text"}
    assert matches([], found, "sd1")[0].is_whole


@pytest.fixture(params=["whole", "by layers"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The base is tried as a whole, or as on a machine that has no memory free for it."""
    if request.param == "by layers":
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    return request.param


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_sound_file_passes_and_diffusers_computes_the_same(
    kind: str, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tiny_base(kind, tmp_path / "base")
    tensors = factors(folder, TEXT)
    save_file(tensors, tmp_path / "it.safetensors")  # sdxl is told by its second text encoder
    code, out = verified(tmp_path / "it.safetensors", folder, capsys)
    assert code == 0 and "nothing is wrong" in out and ("tried layer by layer" in out) == (way == "by layers")
    assert out.count("diffusers differs from ours by") == (3 if kind == "sdxl" else 2)
    total = len(tensors) // 3
    assert out.count(f"{total} / {total}") == 5


def test_text_attention_that_diffusers_drops_without_its_output_projection_is_found(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tiny_base("sd1", tmp_path / "base")
    save_file(factors(folder, r".*\.(q_proj|fc1)"), tmp_path / "it.safetensors")
    code, out = verified(tmp_path / "it.safetensors", folder, capsys)
    assert code == 65 and "nothing is wrong" not in out
    dropped = ["text"] if way == "whole" else [f"text.encoder.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert re.findall(r"diffusers: its ([\w.]+) is", out) == dropped


def adapted_layers(pipeline: StableDiffusionPipeline) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in pipeline.unet.named_modules() if isinstance(layer, LoraLayer)}


def double(pipeline: StableDiffusionPipeline) -> list[str]:
    """One layer with twice its strength."""
    name, layer = next(iter(adapted_layers(pipeline).items()))
    layer.scale_layer(2.0)
    return [name]


def swap(pipeline: StableDiffusionPipeline) -> list[str]:
    """The factors of two layers, of the same shapes, each on the other."""
    layers = {name: layer for name, layer in adapted_layers(pipeline).items() if "mid_block" not in name}
    names = [name for name in layers if name.endswith("to_q")][-2:]
    one, other = (layers[name] for name in names)
    one.lora_A, other.lora_A = other.lora_A, one.lora_A
    return names


def spread(pipeline: StableDiffusionPipeline) -> list[str]:
    """Factors on a layer of which the file says nothing."""
    pipeline.unet.add_adapter(LoraConfig(target_modules=["mid_block.resnets.0.conv2"], init_lora_weights=False), "more")
    pipeline.unet.set_adapters(["default_0", "more"])
    return ["mid_block.resnets.0.conv2"]


@pytest.mark.parametrize("spoil", [double, swap, spread])
def test_layers_that_diffusers_loads_otherwise_are_named_where_the_base_is_tried_layer_by_layer(
    spoil: Callable[[StableDiffusionPipeline], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tiny_base("sd1", tmp_path / "base")
    save_file(factors(folder, TEXT, r".*\.attn2\.to_[qv]"), tmp_path / "it.safetensors")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    loads, spoilt = StableDiffusionPipeline.load_lora_weights, []

    def load_otherwise(pipeline: StableDiffusionPipeline, file: str) -> None:
        loads(pipeline, file)
        spoilt.extend(spoil(pipeline))

    monkeypatch.setattr(StableDiffusionPipeline, "load_lora_weights", load_otherwise)
    faults = verify(tmp_path / "it.safetensors", str(folder)).faults
    assert spoilt and {fault.split()[2] for fault in faults} == {f"unet.{name}" for name in spoilt}


def test_an_effect_beyond_fp32_is_found(way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tiny_base("sd1", tmp_path / "base")
    tensors = factors(folder, "none", r"mid_block\..*attn2\.to_q")
    save_file({name: 1e25 * tensor for name, tensor in tensors.items()}, tmp_path / "it.safetensors")
    code, out = verified(tmp_path / "it.safetensors", folder, capsys)
    assert code == 65 and "with the adapter its output is not finite" in out


def test_what_one_layer_does_is_what_pefts_layer_does_on_the_loaded_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The effects by layers, on weights that are read one by one, against those on the base as diffusers loads it."""
    folder = tiny_base("sdxl", tmp_path / "base")
    save_file(factors(folder, TEXT), tmp_path / "it.safetensors")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    trials = [t for t in verify(tmp_path / "it.safetensors", str(folder)).trials if t.component == "unet"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(str(tmp_path / "it.safetensors"))
    layers = {name: layer for name, layer in pipeline.unet.named_modules() if isinstance(layer, LoraLayer)}
    assert {trial.layer for trial in trials} == set(layers) and any("conv1" in name for name in layers)
    for trial in trials:
        layer, generator = layers[trial.layer], torch.Generator().manual_seed(0)
        own = layer.get_base_layer()
        shape = (8, own.in_features) if isinstance(own, torch.nn.Linear) else (1, own.in_channels, 4, 4)
        noise = torch.randn(shape, generator=generator)
        with torch.no_grad():
            effect = float((layer(noise) - own(noise)).abs().max())
        assert effect > 0.01 and trial.effect == pytest.approx(effect, rel=1e-4)


def test_what_is_wrong_is_named_without_loading_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tiny_base("sd1", tmp_path / "base")
    file = tmp_path / "it.safetensors"
    whole = factors(folder, TEXT)
    down = next(name for name in whole if name.endswith("down.weight") and "attn2_to_q" in name)

    def broken(change: dict[str, torch.Tensor]) -> str:
        save_file(whole | change, file)
        code, out = verified(file, folder, capsys, "--quick")
        assert code == 65
        return out

    save_file(whole, file)
    assert verified(file, folder, capsys, "--quick")[0] == 0
    assert "to_q: holds numbers that are not finite" in broken({down: torch.full_like(whole[down], torch.nan)})
    assert "to_q: is 16 x 17 and the base's layer 16 x 16" in broken({down: torch.ones(2, 17)})
    stem = "lora_unet_down_blocks_9_attentions_0_proj_in"
    foreign = {f"{stem}.lora_down.weight": torch.ones(2, 16), f"{stem}.lora_up.weight": torch.ones(16, 2)}
    assert "down_blocks.9.attentions.0.proj_in: is not in the base" in broken(foreign)
    peft = to_tensors(from_tensors(whole, {}, "x"), "peft")
    save_file(peft, file)
    code, out = verified(file, folder, capsys, "--quick")
    assert code == 65 and "tensors without a home" in out and "adapter convert" in out
    stock = StableDiffusionPipeline.from_pretrained(folder)
    stock.load_lora_weights(str(file))  # which shows that only the UIs have trouble with it
    assert stock.get_active_adapters() == ["default_0"]


@pytest.mark.parametrize("network", ["dora", "loha", "lokr"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_kinds_that_diffusers_does_not_know_are_tried_on_the_base_and_it_is_said(
    network: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder = tiny_base(kind, tmp_path / "base")
    model = Model(base=str(folder))
    base = load(model, detect_base(model), torch.device("cpu"), torch.float32)
    names = ["text", "text2"][: len(base.text_encoders)]
    parts = [Part("unet", 4, 4.0), *(Part(name, 2, 2.0) for name in names)]
    trained = attach(base, Network(algorithm=network, lokr_factor=4), parts, seed=0)  # ty: ignore[invalid-argument-type]
    generator = torch.Generator().manual_seed(0)
    for module in trained:
        for slot, parameter in module.tensors.items():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * (1 + noise) if slot == "dora_scale" else parameter.data + noise
    file = tmp_path / "it.safetensors"
    export(file, trained, {"ss_base_model_version": "sd_v1" if kind == "sd1" else "sdxl_base_v1-0"}, torch.float32)
    with torch.no_grad():
        live = {name: output_of(base, name) for name in ("unet", *names)}
    verdict = verify(file, str(folder))
    assert verdict.is_sound and not verdict.faults and {match.ui for match in verdict.uis if match.is_whole} >= {
        "ComfyUI", "A1111", "Forge"
    }  # fmt: skip
    assert [trial.difference for trial in verdict.trials] == [None] * len(live)
    plain = load(model, detect_base(model), torch.device("cpu"), torch.float32)
    for trial in verdict.trials:  # what verify adds to the weights moves the output as PEFT's layers do
        alone = output_of(plain, trial.component)
        effect = float((live[trial.component] - alone).abs().max())
        assert effect > 0.01 and trial.effect == pytest.approx(effect, rel=1e-3)
    code, out = verified(file, folder, capsys)
    reason = {"loha": "it cannot read LoHa", "lokr": "it cannot read LoKr"}.get(network, "it leaves out DoRA's")
    assert code == 0 and f"not tried in diffusers: {reason}" in out and "nothing is wrong" in out
    assert "not tried in diffusers" in verified(file, folder, capsys, "--quick")[1]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    by_layers = verify(file, str(folder))
    assert by_layers.is_sound and {trial.difference for trial in by_layers.trials} == {None}
    assert len(by_layers.trials) == len(trained) and all(trial.effect > 0 for trial in by_layers.trials)


def test_dora_by_outputs_is_a_fault_in_a_file_for_uis(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tiny_base("sd1", tmp_path / "base")
    tensors = factors(folder, "none", r"mid_block\..*attn1\.to_q")
    stem = next(iter(tensors)).partition(".")[0]
    for shape, code in (((1, 32), 0), ((32, 1), 65)):
        save_file(tensors | {f"{stem}.dora_scale": torch.ones(shape)}, tmp_path / "it.safetensors")
        found, out = verified(tmp_path / "it.safetensors", folder, capsys, "--quick")
        assert found == code and ("magnitudes by outputs, which UIs compute otherwise" in out) == bool(code)
