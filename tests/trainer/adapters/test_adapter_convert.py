"""Conversion between dialects keeps the adapter: stock diffusers loads both files and renders the same image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_base

from scumble.trainer import cli
from scumble.trainer.adapters.adapter import read_adapter
from scumble.trainer.adapters.files import read_tensors

PIPELINES: dict[str, Any] = {"sd1": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
UNET = LoraConfig(
    r=4, lora_alpha=2, target_modules=["to_q", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1"],
    rank_pattern={"conv1": 2}, alpha_pattern={"conv1": 3},
)  # fmt: skip
TEXT = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])


def randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def trained(kind: str, folder: Path) -> tuple[Any, Path]:
    """A tiny pipeline with adapters of mixed ranks and scales, and the file that diffusers saves."""
    pipeline = PIPELINES[kind].from_pretrained(tiny_base(kind, folder / "base"))
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    if kind == "sdxl":
        parts["text_encoder_2"] = pipeline.text_encoder_2
    for name, part in parts.items():
        part.add_adapter(UNET if name == "unet" else TEXT)
        randomize(part)
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(part) for name, part in parts.items()}
    pipeline.save_lora_weights(folder, **layers, **_collate_lora_metadata(parts))
    return pipeline, folder / "pytorch_lora_weights.safetensors"


def rendered(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        "a cat", num_inference_steps=2, height=64, width=64, generator=torch.manual_seed(0), output_type="np"
    )
    return result.images[0]


def with_file(kind: str, folder: Path, file: Path) -> np.ndarray:
    pipeline = PIPELINES[kind].from_pretrained(folder / "base")
    pipeline.load_lora_weights(str(file))
    return rendered(pipeline)


def convert(source: Path, out: Path, *arguments: str) -> Path:
    cli.main(["adapter", "convert", str(source), "--out", str(out), *arguments])
    return out


@pytest.mark.parametrize("kind", PIPELINES)
def test_both_dialects_render_the_same_image_as_the_live_adapter(kind: str, tmp_path: Path):
    pipeline, file = trained(kind, tmp_path)
    live = rendered(pipeline)
    kohya = convert(file, tmp_path / "kohya.safetensors", "--to", "kohya")
    peft = convert(kohya, tmp_path / "peft.safetensors", "--to", "peft")
    plain = rendered(PIPELINES[kind].from_pretrained(tmp_path / "base"))
    assert np.abs(live - plain).max() > 0.01
    for written in (kohya, peft):
        np.testing.assert_allclose(with_file(kind, tmp_path, written), live, atol=1e-4, err_msg=written.name)


def test_alpha_patterns_of_peft_are_applied(tmp_path: Path):
    pipeline, file = trained("sd1", tmp_path)
    adapter = read_adapter(file)
    deltas = {layer.path: module.delta() for layer, module in adapter.modules.items() if layer.component == "unet"}
    checked = 0
    for path, layer in pipeline.unet.named_modules():
        if isinstance(layer, LoraLayer):
            expected = layer.get_delta_weight("default").flatten(1)
            torch.testing.assert_close(deltas[path], expected, msg=path)
            checked += 1
    assert checked == len(deltas) > 20


def test_a_round_trip_keeps_every_delta_and_the_metadata(tmp_path: Path):
    _, file = trained("sd1", tmp_path)
    metadata = {"ss_tag_frequency": '{"a": {"cat": 3}}', "modelspec.title": "mine", "sshs_legacy_hash": "0"}
    tensors, _ = read_tensors(convert(file, tmp_path / "plain.safetensors", "--to", "kohya"))
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    peft = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "peft")
    again = convert(peft, tmp_path / "c.safetensors", "--to", "kohya")
    first, last = read_adapter(tmp_path / "a.safetensors"), read_adapter(again)
    assert first.modules.keys() == last.modules.keys()
    for layer, module in first.modules.items():
        torch.testing.assert_close(last.modules[layer].delta(), module.delta())
    for path in (peft, again):
        with safe_open(path, "pt") as written:
            metadata = written.metadata()
        assert metadata["modelspec.title"] == "mine"
        assert json.loads(metadata["ss_tag_frequency"]) == {"a": {"cat": 3}}
        assert LORA_ADAPTER_METADATA_KEY not in metadata and "sshs_legacy_hash" not in metadata
    assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == ("sd_v1", "False")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_values_are_rounded_as_torch_rounds_them(dtype: str, tmp_path: Path):
    _, file = trained("sd1", tmp_path)
    plain, _ = read_tensors(convert(file, tmp_path / "a.safetensors", "--to", "kohya"))
    found, _ = read_tensors(convert(file, tmp_path / "b.safetensors", "--to", "kohya", "--dtype", dtype))
    expected = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    for name, tensor in found.items():
        assert torch.equal(tensor, plain[name] if name.endswith("alpha") else plain[name].to(expected)), name


def test_impossible_conversions_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main(["adapter", "convert", *arguments])
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.count("\n") == 1
        return line

    stem = "lora_unet_mid_block_attentions_0_proj_in"
    big = {f"{stem}.lora_{end}.weight": torch.full((2, 2), 1e5) for end in ("up", "down")}
    save_file(big, tmp_path / "big.safetensors")
    save_file({f"{stem}.lokr_w1": torch.ones(2, 2), f"{stem}.lokr_w2": torch.ones(2, 2)}, tmp_path / "k.safetensors")
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    source, out = str(tmp_path / "big.safetensors"), ("--out", str(tmp_path / "out.safetensors"))
    assert "is an input of this command; choose another" in refused(source, "--to", "kohya", "--out", source)
    assert "file exists; choose another name, or use --force" in refused(
        source, "--to", "kohya", "--out", str(tmp_path / "there.safetensors")
    )
    assert "has values that overflow fp16; use --dtype bf16" in refused(
        source, "--to", "kohya", "--dtype", "fp16", *out
    )
    line = refused(lokr := str(tmp_path / "k.safetensors"), "--to", "peft", *out)
    assert f"{lokr}: unet" in line and "a PEFT file cannot hold LoKr; use --to kohya" in line
    assert "--to" in refused(source, "--to", "comfy", *out)
    assert not (tmp_path / "out.safetensors").exists() and (tmp_path / "there.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("kind", PIPELINES)
def test_rank_stabilized_scales_survive_the_round_trip_from_peft_to_kohya(kind: str, tmp_path: Path):
    """With alpha 4 at rank 4, the scale is 2 with rsLoRA and 1 without, so losing the flag would halve every delta."""
    rslora = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_out.0", "conv1"], use_rslora=True)
    pipeline = PIPELINES[kind].from_pretrained(tiny_base(kind, tmp_path / "base"))
    pipeline.unet.add_adapter(rslora)
    randomize(pipeline.unet)
    layers = {"unet_lora_layers": get_peft_model_state_dict(pipeline.unet)}
    pipeline.save_lora_weights(tmp_path, **layers, **_collate_lora_metadata({"unet": pipeline.unet}))
    live = {path: layer.get_delta_weight("default").flatten(1) for path, layer in lora_layers(pipeline.unet)}
    kohya = convert(tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "kohya.safetensors")
    peft = convert(kohya, tmp_path / "peft.safetensors", "--to", "peft")
    again = convert(peft, tmp_path / "again.safetensors")
    for file in (kohya, peft, again):
        modules = {layer.path: module for layer, module in read_adapter(file).modules.items()}
        assert modules.keys() == live.keys()
        for path, module in modules.items():
            torch.testing.assert_close(module.delta(), live[path], msg=f"{file.name} {path}")
    loaded = PIPELINES[kind].from_pretrained(tmp_path / "base").unet  # PEFT itself loads the file with a scale of 1
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=rslora.target_modules), loaded, "default")
    state = {name.removeprefix("unet."): tensor for name, tensor in read_tensors(peft)[0].items()}
    assert not set_peft_model_state_dict(loaded, state).unexpected_keys
    for path, layer in lora_layers(loaded):
        torch.testing.assert_close(layer.get_delta_weight("default").flatten(1), live[path], msg=path)


def lora_layers(model: Any) -> list[tuple[str, Any]]:
    return [(path, layer) for path, layer in model.named_modules() if isinstance(layer, LoraLayer)]


@pytest.mark.parametrize("rslora", [True, False])
def test_a_folder_saved_by_peft_is_read_with_the_scale_from_its_config(rslora: bool, tmp_path: Path):
    unet: Any = StableDiffusionPipeline.from_pretrained(tiny_base("sd1", tmp_path / "base")).unet
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "conv1"], use_rslora=rslora, alpha_pattern={"conv1": 3}
    )
    model = get_peft_model(unet, config)
    randomize(model)
    model.save_pretrained(str(tmp_path / "peft"))
    adapter = read_adapter(tmp_path / "peft/adapter_model.safetensors")
    layers = lora_layers(model.base_model.model)
    assert len(layers) == len(adapter.modules)
    for layer, module in adapter.modules.items():
        expected = dict(layers)[layer.path].get_delta_weight("default").flatten(1)
        torch.testing.assert_close(module.delta(), expected, msg=layer.path)


def test_dora_is_not_converted_between_peft_and_kohya(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """PEFT has per-output magnitudes and UIs have per-input ones, and neither can be converted to the other."""
    unet: Any = StableDiffusionPipeline.from_pretrained(tiny_base("sd1", tmp_path / "base")).unet
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "conv1"], use_dora=True), unet, "default")
    randomize(unet)
    state = {f"unet.{name}": tensor.detach() for name, tensor in get_peft_model_state_dict(unet).items()}
    save_file(state, tmp_path / "peft.safetensors")
    same, _ = read_tensors(convert(tmp_path / "peft.safetensors", tmp_path / "same.safetensors", "--to", "peft"))
    assert same.keys() == state.keys() and any("magnitude" in name for name in same)
    for name, tensor in state.items():
        torch.testing.assert_close(same[name], tensor, msg=name)
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    parts = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2), "dora_scale": torch.ones(1, 8)}
    save_file({f"{stem}.{slot}": tensor for slot, tensor in parts.items()}, tmp_path / "kohya.safetensors")
    for source, dialect, line in (
        ("peft", "kohya", "PEFT's DoRA has per-output magnitudes, which no UI computes the way PEFT does; merge it"),
        ("kohya", "peft", "a PEFT file cannot hold DoRA with per-input magnitudes; use --to kohya"),
    ):
        with pytest.raises(SystemExit):
            convert(tmp_path / f"{source}.safetensors", tmp_path / "no.safetensors", "--to", dialect)
        assert line in capsys.readouterr().err
    assert not (tmp_path / "no.safetensors").exists()
