"""Extraction against what was put in: by PEFT's merge, by random changes, through folders and one file."""

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
    """The base's UNet with a PEFT LoRA of rank 3 merged into it by PEFT, and the delta of each layer."""
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
def test_a_lora_that_peft_merged_comes_back_at_its_own_rank(base: Path, tmp_path: Path, convs: bool):
    tuned, deltas = unet_tuned(base, tmp_path / "tuned")
    found = extract(base, tuned, Rule(3), text=False, convs=convs, dtype=torch.float32)
    wanted = {name.removesuffix(".weight") for name in deltas if convs or "conv1" not in name}
    assert {place.path for place in found.adapter.modules} == wanted and len(wanted) > 20
    for place, module in found.adapter.modules.items():
        delta = deltas[f"{place.path}.weight"]
        torch.testing.assert_close(module.delta(), delta.flatten(1), rtol=1e-3, atol=1e-4)
        assert module.tensors["lora_down"].shape == (3, *delta.shape[1:])
    assert max(found.errors.values()) < 1e-3


def test_by_energy_a_layer_gets_no_more_rank_than_it_needs(base: Path, tmp_path: Path):
    tuned, deltas = unet_tuned(base, tmp_path / "tuned")
    found = extract(base, tuned, Rule(8, energy=0.9999), text=False)
    assert {module.rank for module in found.adapter.modules.values()} == {3}
    few = extract(base, tuned, Rule(8, energy=0.6), text=False)
    for place, module in few.adapter.modules.items():
        squares = torch.linalg.svdvals(deltas[f"{place.path}.weight"].flatten(1)).square()
        assert module.rank == int((squares.cumsum(0) / squares.sum() < 0.6).sum()) + 1


def test_a_change_of_full_rank_leaves_the_error_that_is_reported(base: Path, tmp_path: Path):
    (tmp_path / "tuned/unet").mkdir(parents=True)
    weights = load_file(base / "unet" / PART)
    name = "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"
    change = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(1))
    save_file(weights | {name: weights[name] + change}, tmp_path / "tuned/unet" / PART)
    found = extract(base, tmp_path / "tuned", Rule(4), text=False, dtype=torch.float32)
    s = torch.linalg.svdvals(change)
    assert [place.path for place in found.adapter.modules] == [name.removesuffix(".weight")]
    assert found.errors["mid_block"] == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-3)


def test_text_encoders_come_along_and_the_adapter_baked_in_gives_the_tuned_model(base: Path, tmp_path: Path):
    places = [ModulePath("text", "encoder.layers.1.mlp.fc1"), ModulePath("unet", "mid_block.attentions.0.proj_out")]
    generator = torch.Generator().manual_seed(2)
    modules = {}
    for place in places:
        weight = find_weights(base).read(place)
        ones = (1,) * (weight.dim() - 2)
        tensors = {
            "lora_down": torch.randn(2, *weight.shape[1:], generator=generator),
            "lora_up": torch.randn(len(weight), 2, *ones, generator=generator),
        }
        modules[place] = Module("lora", tensors, 2.0)
    bake(base, tmp_path / "tuned", [BakedAdapter("x", Adapter(modules))])
    found = extract(base, tmp_path / "tuned", Rule(2), dtype=torch.float32)
    assert set(found.adapter.modules) == set(places) and found.errors.keys() == {"text", "mid_block"}
    assert set(extract(base, tmp_path / "tuned", Rule(2), text=False).adapter.modules) == {places[1]}
    bake(base, tmp_path / "again", [BakedAdapter("y", found.adapter)])
    for place in places:
        again, tuned = (find_weights(tmp_path / name).read(place) for name in ("again", "tuned"))
        torch.testing.assert_close(again, tuned, rtol=1e-4, atol=1e-4)


def test_fused_rows_of_one_file_are_told_apart_and_sd2s_unused_layer_is_left_out(tmp_path: Path):
    layer, unused = (f"cond_stage_model.model.transformer.resblocks.{n}.attn.in_proj_weight" for n in (5, 23))
    to_k = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    before = {layer: torch.zeros(24, 8), unused: torch.zeros(24, 8), to_k: torch.zeros(16, 1024)}
    after = {name: weight.clone() for name, weight in before.items()}
    rows = torch.outer(torch.arange(1.0, 9.0), torch.arange(2.0, 10.0))
    after[layer][8:16] += rows  # k alone
    after[unused] += 1
    save_file(before, tmp_path / "base.safetensors")
    save_file(after, tmp_path / "tuned.safetensors")
    found = extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", Rule(2, energy=0.999))
    place = ModulePath("text", "encoder.layers.5.self_attn.k_proj")
    assert found.adapter.family == "sd2" and list(found.adapter.modules) == [place]
    assert found.adapter.modules[place].rank == 1
    torch.testing.assert_close(found.adapter.modules[place].delta(), rows, rtol=1e-2, atol=1e-2)


def test_what_makes_no_sense_is_one_line(base: Path, tmp_path: Path):
    save_file(
        {"model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(16, 2048)},
        tmp_path / "xl.safetensors",
    )
    save_file(
        {"model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(16, 768)},
        tmp_path / "part.safetensors",
    )
    for tuned, rule, line in (
        (base, Rule(4), "do not differ in any layer that an adapter can have"),
        (base, Rule(0), "--rank 0: say how large a rank may be"),
        (base, Rule(4, energy=2), "--energy 2: a share is between 0 and 1"),
        (tmp_path / "xl.safetensors", Rule(4), "is a base of sdxl, .* of sd1"),
        (tmp_path / "part.safetensors", Rule(4), r"part\.safetensors lacks .*they are of different kinds"),
        (tmp_path / "none", Rule(4), "no such file or folder"),
    ):
        with pytest.raises(Refused, match=line) as error:
            extract(base, tuned, rule)
        assert "\n" not in str(error.value)
