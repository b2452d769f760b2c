"""Extraction recovers known changes: a LoRA merged by PEFT, random changes, in folders and single files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny import tiny_base

from scumble.configs.errors import Refused
from scumble.trainer.adapters.adapter import Adapter, Module
from scumble.trainer.adapters.bake import BakedAdapter, bake
from scumble.trainer.adapters.extract import extract
from scumble.trainer.adapters.keys import ModulePath
from scumble.trainer.adapters.lowrank import Rule
from scumble.trainer.adapters.weights import find_weights

PART = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base("sd1", tmp_path_factory.mktemp("extract") / "base")


def unet_tuned(base: Path, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The base's UNet with a LoRA of rank 3 merged by PEFT, and the delta of each layer."""
    unet: Any = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    unet.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_v", "proj_in", "conv1"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    unet.fuse_lora()
    unet.unload_lora()
    unet.save_pretrained(folder / "unet")
    after = unet.state_dict()
    return folder, {
        name: after[name] - weight for name, weight in before.items() if not torch.equal(after[name], weight)
    }


@pytest.mark.parametrize("convs", [False, True])
def test_a_lora_merged_by_peft_is_recovered_at_its_own_rank(base: Path, tmp_path: Path, convs: bool):
    tuned, deltas = unet_tuned(base, tmp_path / "tuned")
    found = extract(base, tuned, Rule(3), text=False, convs=convs, dtype=torch.float32)
    expected = {name.removesuffix(".weight") for name in deltas if convs or "conv1" not in name}
    assert {layer.path for layer in found.adapter.modules} == expected and len(expected) > 20
    for layer, module in found.adapter.modules.items():
        delta = deltas[f"{layer.path}.weight"]
        torch.testing.assert_close(module.delta(), delta.flatten(1), rtol=1e-3, atol=1e-4)
        assert module.tensors["lora_down"].shape == (3, *delta.shape[1:])
    assert max(found.errors.values()) < 1e-3


def test_with_energy_a_layer_gets_no_more_rank_than_it_needs(base: Path, tmp_path: Path):
    tuned, deltas = unet_tuned(base, tmp_path / "tuned")
    found = extract(base, tuned, Rule(8, energy=0.9999), text=False)
    assert {module.rank for module in found.adapter.modules.values()} == {3}
    few = extract(base, tuned, Rule(8, energy=0.6), text=False)
    for layer, module in few.adapter.modules.items():
        squares = torch.linalg.svdvals(deltas[f"{layer.path}.weight"].flatten(1)).square()
        assert module.rank == int((squares.cumsum(0) / squares.sum() < 0.6).sum()) + 1


def test_the_reported_error_of_a_full_rank_change_is_the_true_one(base: Path, tmp_path: Path):
    (tmp_path / "tuned/unet").mkdir(parents=True)
    weights = load_file(base / "unet" / PART)
    name = "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"
    change = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(1))
    save_file(weights | {name: weights[name] + change}, tmp_path / "tuned/unet" / PART)
    found = extract(base, tmp_path / "tuned", Rule(4), text=False, dtype=torch.float32)
    s = torch.linalg.svdvals(change)
    assert [layer.path for layer in found.adapter.modules] == [name.removesuffix(".weight")]
    assert found.errors["mid_block"] == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-3)


def test_text_encoders_are_included_and_baking_the_result_gives_the_tuned_model(base: Path, tmp_path: Path):
    layers = [ModulePath("text", "encoder.layers.1.mlp.fc1"), ModulePath("unet", "mid_block.attentions.0.proj_out")]
    generator = torch.Generator().manual_seed(2)
    modules = {}
    for layer in layers:
        weight = find_weights(base).read(layer)
        ones = (1,) * (weight.dim() - 2)
        tensors = {
            "lora_down": torch.randn(2, *weight.shape[1:], generator=generator),
            "lora_up": torch.randn(len(weight), 2, *ones, generator=generator),
        }
        modules[layer] = Module("lora", tensors, 2.0)
    bake(base, tmp_path / "tuned", [BakedAdapter("x", Adapter(modules))])
    found = extract(base, tmp_path / "tuned", Rule(2), dtype=torch.float32)
    assert set(found.adapter.modules) == set(layers) and found.errors.keys() == {"text", "mid_block"}
    assert set(extract(base, tmp_path / "tuned", Rule(2), text=False).adapter.modules) == {layers[1]}
    bake(base, tmp_path / "again", [BakedAdapter("y", found.adapter)])
    for layer in layers:
        again, tuned = (find_weights(tmp_path / name).read(layer) for name in ("again", "tuned"))
        torch.testing.assert_close(again, tuned, rtol=1e-4, atol=1e-4)


def test_rows_of_a_fused_matrix_are_separated_and_the_unused_layer_of_sd2_is_left_out(tmp_path: Path):
    fused, unused = (f"cond_stage_model.model.transformer.resblocks.{n}.attn.in_proj_weight" for n in (5, 23))
    to_k = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    before = {fused: torch.zeros(24, 8), unused: torch.zeros(24, 8), to_k: torch.zeros(16, 1024)}
    after = {name: weight.clone() for name, weight in before.items()}
    rows = torch.outer(torch.arange(1.0, 9.0), torch.arange(2.0, 10.0))
    after[fused][8:16] += rows  # only k
    after[unused] += 1
    save_file(before, tmp_path / "base.safetensors")
    save_file(after, tmp_path / "tuned.safetensors")
    found = extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", Rule(2, energy=0.999))
    layer = ModulePath("text", "encoder.layers.5.self_attn.k_proj")
    assert found.adapter.family == "sd2" and list(found.adapter.modules) == [layer]
    assert found.adapter.modules[layer].rank == 1
    torch.testing.assert_close(found.adapter.modules[layer].delta(), rows, rtol=1e-2, atol=1e-2)


def test_invalid_requests_are_refused_in_one_line(base: Path, tmp_path: Path):
    save_file(
        {"model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(16, 2048)},
        tmp_path / "xl.safetensors",
    )
    save_file(
        {"model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(16, 768)},
        tmp_path / "part.safetensors",
    )
    for tuned, rule, line in (
        (base, Rule(4), "does not differ from .* in any layer that an adapter can change"),
        (base, Rule(0), "--rank 0: must be 1 or more"),
        (base, Rule(4, energy=2), "--energy 2: must be a number from 0 to 1"),
        (tmp_path / "xl.safetensors", Rule(4), "is sdxl, but --base .* is sd1; use models of one family"),
        (tmp_path / "part.safetensors", Rule(4), r"part\.safetensors: is missing .*use models of one architecture"),
        (tmp_path / "none", Rule(4), "no such file or folder"),
    ):
        with pytest.raises(Refused, match=line) as error:
            extract(base, tuned, rule)
        assert "\n" not in str(error.value)
