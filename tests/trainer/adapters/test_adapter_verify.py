"""Which keys each UI matches on the real layouts, and whether stock diffusers gives the same outputs as our dW."""

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
    """Module names in diffusers and transformers, by pipeline component."""
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
    """(part, module name) of the adapted layers: UNet layers that match a regex, and all text encoder layers."""
    return [
        (part, name)
        for part, names in modules(family).items()
        for name in names
        if re.fullmatch(unet if part == "unet" else TEXT, name)
    ]


def layer_of(part: str, name: str) -> ModulePath:
    component = {"unet": "unet", "text_encoder": "text", "text_encoder_2": "text2"}[part]
    return ModulePath(component, name.removeprefix("text_model."))


def layout(family: str) -> list[ModulePath]:
    return [layer_of(part, name) for part, name in chosen(family, f"{FULL}|{CONVS}|{OTHERS}")]


def shapes(base: Path) -> dict[ModulePath, tuple[int, ...]]:
    return {layer: stored.shape for layer, stored in find_weights(base).layers.items()}


def matched_modules(names: list[str], family: str) -> dict[str, int]:
    return {match.ui: match.matched for match in matches(names, layout(family), family)}


@pytest.mark.parametrize(("family", "total"), [("sd1", 200), ("sd2", 128 + 138), ("sdxl", 824)])
def test_our_kohya_keys_match_in_every_ui(family: str, total: int):
    names = [f"{kohya_stem(layer_of(*entry), family)}.{slot}" for entry in chosen(family) for slot in SLOTS]
    assert matched_modules(names, family) == dict.fromkeys(
        ("ComfyUI", "A1111", "Forge", "InvokeAI", "diffusers"), total
    )


@pytest.mark.parametrize(("family", "total"), [("sd1", 278 + 72), ("sd2", 278 + 138), ("sdxl", 788 + 264)])
def test_our_kohya_keys_of_all_layers_with_convolutions_match_in_every_ui(family: str, total: int):
    entries = chosen(family, f"{FULL}|{CONVS}")
    names = [f"{kohya_stem(layer_of(*entry), family)}.{slot}" for entry in entries for slot in SLOTS]
    assert set(matched_modules(names, family).values()) == {total} and len(entries) == total


@pytest.mark.parametrize(("family", "comfyui", "total"), [("sd1", 0, 200), ("sdxl", 192, 824)])
def test_keys_saved_by_diffusers_do_not_match_in_the_uis(family: str, comfyui: int, total: int):
    names = [f"{part}.{name}.lora_{end}.weight" for part, name in chosen(family) for end in "AB"]
    found = matched_modules(names, family)
    assert found == {"ComfyUI": comfyui, "A1111": 0, "Forge": 0, "InvokeAI": 0, "diffusers": total}
    assert {match.ui for match in matches(names, layout(family), family) if match.refusal} == {"Forge", "InvokeAI"}


@pytest.mark.parametrize(("family", "most"), [("sd1", 128), ("sdxl", 752)])
def test_the_kohya_conversion_of_diffusers_loses_the_first_text_encoder(family: str, most: int):
    peft = {f"{part}.{name}.lora_{end}.weight": torch.ones(2, 2) for part, name in chosen(family) for end in "AB"}
    found = matched_modules(list(convert_state_dict_to_kohya(peft)), family)
    assert (found["ComfyUI"], found["A1111"], found["Forge"], found["InvokeAI"]) == (most, most, 0, most)


def test_diffusers_block_names_lose_three_modules_of_sdxl_in_a1111():
    names = [
        f"lora_unet_{name.replace('.', '_')}.{slot}"
        for part, name in chosen("sdxl", f"{FULL}|{CONVS}|{OTHERS}") if part == "unet"
        for slot in SLOTS
    ]  # fmt: skip
    ignored = {match.ui: match.ignored for match in matches(names, layout("sdxl"), "sdxl")}
    assert ignored["A1111"] == (
        "lora_unet_add_embedding_linear_1",
        "lora_unet_add_embedding_linear_2",
        "lora_unet_up_blocks_0_upsamplers_0_conv",
    )
    assert not ignored["ComfyUI"] and len(ignored["diffusers"]) == 2


def test_invokeai_ignores_te1_on_sd1_and_forge_rejects_more_than_12_unmatched_tensors():
    stems = ["lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_mid_block_attentions_0_proj_in"]
    names = [f"{stem}.{slot}" for stem in stems for slot in SLOTS]
    assert matched_modules(names, "sd1") == {"ComfyUI": 2, "A1111": 2, "Forge": 2, "InvokeAI": 1, "diffusers": 2}
    for number, forge in ((12, 2), (13, 0)):
        unknown = [f"lora_unet_nonsense_{index}.alpha" for index in range(number)]
        assert matched_modules(names + unknown, "sd1")["Forge"] == forge


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_layout_of_a_base_matches_its_modules(kind: str, tmp_path: Path):
    folder = tiny_base(kind, tmp_path)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    assert isinstance(unet, UNet2DConditionModel)
    found = shapes(folder)
    expected = {
        name: tuple(layer.weight.shape) for name, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    }  # fmt: skip
    assert {layer.path: shape for layer, shape in found.items() if layer.component == "unet"} == expected
    assert sum(layer.component != "unet" for layer in found) == 2 * 6 * (2 if kind == "sdxl" else 1)
    assert found[ModulePath("text", "encoder.layers.1.mlp.fc1")] == (64, 32)


def test_a_single_file_has_the_same_layout_as_the_folder(tmp_path: Path):
    """Names as in SD 2 and SDXL checkpoints: sgm names for the UNet, fused projections of OpenCLIP."""
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
    """Random factors with kohya keys on the chosen layers of a tiny base."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer, shape in shapes(folder).items():
        if re.fullmatch(unet if layer.component == "unet" else text, layer.path):
            stem = kohya_stem(layer, "sdxl" if (folder / "text_encoder_2").exists() else "sd1")
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


def test_the_embedded_base_has_a_layout():
    found = shapes(EMBEDDED)
    assert {layer.component for layer in found} == {"unet", "text"}
    assert matches([], found, "sd1")[0].is_complete


@pytest.fixture(params=["whole", "by layer"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Check the base as a whole, or layer by layer as on a machine with too little free memory."""
    if request.param == "by layer":
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    return request.param


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_valid_file_passes_and_diffusers_gives_the_same_outputs(
    kind: str, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tiny_base(kind, tmp_path / "base")
    tensors = factors(folder, TEXT)
    save_file(tensors, tmp_path / "it.safetensors")  # its second text encoder identifies sdxl
    code, out = verified(tmp_path / "it.safetensors", folder, capsys)
    assert code == 0 and "no problems found" in out and ("checked layer by layer" in out) == (mode == "by layer")
    assert out.count("diffusers differs from ours by") == (3 if kind == "sdxl" else 2)
    total = len(tensors) // 3
    assert out.count(f"{total} / {total}") == 5


def test_text_attention_that_diffusers_drops_without_out_proj_is_reported(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tiny_base("sd1", tmp_path / "base")
    save_file(factors(folder, r".*\.(q_proj|fc1)"), tmp_path / "it.safetensors")
    code, out = verified(tmp_path / "it.safetensors", folder, capsys)
    assert code == 65 and "no problems found" not in out
    dropped = ["text"] if mode == "whole" else [f"text.encoder.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert re.findall(r"([\w.]+): the output in diffusers differs", out) == dropped


def adapted_layers(pipeline: StableDiffusionPipeline) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in pipeline.unet.named_modules() if isinstance(layer, LoraLayer)}


def double(pipeline: StableDiffusionPipeline) -> list[str]:
    """Double the strength of one layer."""
    name, layer = next(iter(adapted_layers(pipeline).items()))
    layer.scale_layer(2.0)
    return [name]


def swap(pipeline: StableDiffusionPipeline) -> list[str]:
    """Swap the factors of two layers of equal shape."""
    layers = {name: layer for name, layer in adapted_layers(pipeline).items() if "mid_block" not in name}
    names = [name for name in layers if name.endswith("to_q")][-2:]
    one, other = (layers[name] for name in names)
    one.lora_A, other.lora_A = other.lora_A, one.lora_A
    return names


def add(pipeline: StableDiffusionPipeline) -> list[str]:
    """Add factors to a layer that the file does not have."""
    pipeline.unet.add_adapter(LoraConfig(target_modules=["mid_block.resnets.0.conv2"], init_lora_weights=False), "more")
    pipeline.unet.set_adapters(["default_0", "more"])
    return ["mid_block.resnets.0.conv2"]


@pytest.mark.parametrize("corrupt", [double, swap, add])
def test_layers_that_diffusers_loads_differently_are_named_in_the_check_by_layer(
    corrupt: Callable[[StableDiffusionPipeline], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tiny_base("sd1", tmp_path / "base")
    save_file(factors(folder, TEXT, r".*\.attn2\.to_[qv]"), tmp_path / "it.safetensors")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    load_weights, corrupted = StableDiffusionPipeline.load_lora_weights, []

    def load_corrupted(pipeline: StableDiffusionPipeline, file: str) -> None:
        load_weights(pipeline, file)
        corrupted.extend(corrupt(pipeline))

    monkeypatch.setattr(StableDiffusionPipeline, "load_lora_weights", load_corrupted)
    faults = verify(tmp_path / "it.safetensors", str(folder)).faults
    assert corrupted and {fault.split(":")[0] for fault in faults} == {f"unet.{name}" for name in corrupted}


def test_an_output_that_overflows_fp32_is_reported(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tiny_base("sd1", tmp_path / "base")
    tensors = factors(folder, "none", r"mid_block\..*attn2\.to_q")
    save_file({name: 1e25 * tensor for name, tensor in tensors.items()}, tmp_path / "it.safetensors")
    code, out = verified(tmp_path / "it.safetensors", folder, capsys)
    assert code == 65 and "its output with the adapter is not finite" in out


def test_effects_by_layer_equal_those_of_peft_layers_on_the_loaded_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Compare effects on weights that are read one by one to effects on the base that diffusers loads."""
    folder = tiny_base("sdxl", tmp_path / "base")
    save_file(factors(folder, TEXT), tmp_path / "it.safetensors")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    checks = [check for check in verify(tmp_path / "it.safetensors", str(folder)).checks if check.component == "unet"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(str(tmp_path / "it.safetensors"))
    layers = {name: layer for name, layer in pipeline.unet.named_modules() if isinstance(layer, LoraLayer)}
    assert {check.layer for check in checks} == set(layers) and any("conv1" in name for name in layers)
    for check in checks:
        layer, generator = layers[check.layer], torch.Generator().manual_seed(0)
        own = layer.get_base_layer()
        shape = (8, own.in_features) if isinstance(own, torch.nn.Linear) else (1, own.in_channels, 4, 4)
        noise = torch.randn(shape, generator=generator)
        with torch.no_grad():
            effect = float((layer(noise) - own(noise)).abs().max())
        assert effect > 0.01 and check.effect == pytest.approx(effect, rel=1e-4)


def test_faults_are_reported_without_loading_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
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
    assert "to_q: has non-finite values" in broken({down: torch.full_like(whole[down], torch.nan)})
    assert "to_q: is 16 x 17, but the base's layer is 16 x 16" in broken({down: torch.ones(2, 17)})
    stem = "lora_unet_down_blocks_9_attentions_0_proj_in"
    foreign = {f"{stem}.lora_down.weight": torch.ones(2, 16), f"{stem}.lora_up.weight": torch.ones(16, 2)}
    assert "down_blocks.9.attentions.0.proj_in: is not in the base" in broken(foreign)
    peft = to_tensors(from_tensors(whole, {}, "x"), "peft")
    save_file(peft, file)
    code, out = verified(file, folder, capsys, "--quick")
    assert code == 65 and "tensors match no layer" in out and "adapter convert" in out
    stock = StableDiffusionPipeline.from_pretrained(folder)
    stock.load_lora_weights(str(file))  # diffusers itself loads the file
    assert stock.get_active_adapters() == ["default_0"]


@pytest.mark.parametrize("network", ["dora", "loha", "lokr"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_kinds_that_diffusers_does_not_support_are_checked_on_the_base_only(
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
    assert verdict.is_sound and not verdict.faults and {match.ui for match in verdict.uis if match.is_complete} >= {
        "ComfyUI", "A1111", "Forge"
    }  # fmt: skip
    assert [check.difference for check in verdict.checks] == [None] * len(live)
    plain = load(model, detect_base(model), torch.device("cpu"), torch.float32)
    for check in verdict.checks:  # dW changes the output as the live layers do
        original = output_of(plain, check.component)
        effect = float((live[check.component] - original).abs().max())
        assert effect > 0.01 and check.effect == pytest.approx(effect, rel=1e-3)
    code, out = verified(file, folder, capsys)
    reason = {"loha": "does not support LoHa", "lokr": "does not support LoKr"}.get(network, "drops DoRA magnitudes")
    assert code == 0 and f"diffusers check skipped: diffusers {reason}" in out and "no problems found" in out
    assert "diffusers check skipped" in verified(file, folder, capsys, "--quick")[1]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    by_layer = verify(file, str(folder))
    assert by_layer.is_sound and {check.difference for check in by_layer.checks} == {None}
    assert len(by_layer.checks) == len(trained) and all(check.effect > 0 for check in by_layer.checks)


def test_per_output_dora_magnitudes_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tiny_base("sd1", tmp_path / "base")
    tensors = factors(folder, "none", r"mid_block\..*attn1\.to_q")
    stem = next(iter(tensors)).partition(".")[0]
    for shape, code in (((1, 32), 0), ((32, 1), 65)):
        save_file(tensors | {f"{stem}.dora_scale": torch.ones(shape)}, tmp_path / "it.safetensors")
        found, out = verified(tmp_path / "it.safetensors", folder, capsys, "--quick")
        assert found == code and ("per-output DoRA magnitudes, which UIs compute differently" in out) == bool(code)
