"""Resizing against dense SVDs; the reported error is the true one."""

import math

import pytest
import torch

from scumble.configs.errors import Refused
from scumble.trainer.adapters.adapter import Adapter, Module, from_tensors, to_tensors
from scumble.trainer.adapters.keys import ModulePath
from scumble.trainer.adapters.lowrank import Rule
from scumble.trainer.adapters.resize import resize

TO_Q = ModulePath("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
TO_K = ModulePath("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k")
CONV = ModulePath("unet", "up_blocks.0.resnets.1.conv1")


def decaying(out: int, inputs: tuple[int, ...], rank: int, decay: float) -> Module:
    """A LoRA whose singular values are decay^0, decay^1, …"""
    u, v = torch.linalg.qr(torch.randn(out, rank))[0], torch.linalg.qr(torch.randn(math.prod(inputs), rank))[0]
    down = (v * decay ** torch.arange(rank).float()).T.reshape(rank, *inputs)
    return Module("lora", {"lora_down": down, "lora_up": u.reshape(out, rank, *(1 for _ in inputs[1:]))}, rank / 2)


@pytest.fixture
def adapter() -> Adapter:
    torch.manual_seed(0)
    modules = {
        TO_Q: decaying(32, (40,), 8, 0.5),
        TO_K: decaying(24, (768,), 8, 0.9),
        CONV: decaying(20, (10, 3, 3), 6, 0.7),
    }
    return Adapter(modules, {"ss_output_name": "x"})


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_fixed_rank_gives_the_best_approximation_and_reports_its_error(adapter: Adapter, rank: int):
    result = resize(adapter, Rule(rank), "x")
    lost: dict[str, float] = {}
    total: dict[str, float] = {}
    written = from_tensors(to_tensors(result.adapter), {}, "x")
    for layer, module in adapter.modules.items():
        dense = module.delta()
        s = torch.linalg.svdvals(dense)
        found = written.modules[layer]
        assert found.rank == rank and found.tensors["lora_down"].shape[1:] == module.tensors["lora_down"].shape[1:]
        error = float((dense - found.delta()).norm())
        assert error == pytest.approx(float(s[rank:].norm()), rel=1e-3, abs=1e-5)
        lost[layer.block] = lost.get(layer.block, 0.0) + error**2
        total[layer.block] = total.get(layer.block, 0.0) + float(dense.norm()) ** 2
    assert result.errors.keys() == {"down_blocks.1", "up_blocks.0"}
    for block, error in result.errors.items():
        assert error == pytest.approx(math.sqrt(lost[block] / total[block]), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_with_energy_every_layer_gets_the_smallest_rank_that_keeps_enough(adapter: Adapter, share: float):
    result = resize(adapter, Rule(energy=share), "x")
    for layer, module in result.adapter.modules.items():
        squares = torch.linalg.svdvals(adapter.modules[layer].delta()).square()
        assert float(squares[: module.rank].sum() / squares.sum()) >= share - 1e-5
        assert float(squares[: module.rank - 1].sum() / squares.sum()) < share
    assert result.rank == max(module.rank for module in result.adapter.modules.values())
    assert all(error <= math.sqrt(1 - share) + 1e-4 for error in result.errors.values())


def test_with_ratio_small_singular_values_are_dropped_and_the_rank_limit_applies(adapter: Adapter):
    ranks = {layer: module.rank for layer, module in resize(adapter, Rule(ratio=0.2), "x").adapter.modules.items()}
    assert ranks == {TO_Q: 3, TO_K: 8, CONV: 5}  # 0.5² = 0.25, 0.9⁷ = 0.48, 0.7⁴ = 0.24
    limited = resize(adapter, Rule(rank=4, ratio=0.2), "x").adapter.modules
    assert [limited[layer].rank for layer in (TO_Q, TO_K, CONV)] == [3, 4, 4]


def test_a_larger_rank_changes_nothing(adapter: Adapter):
    result = resize(adapter, Rule(64), "x")
    for layer, module in result.adapter.modules.items():
        assert module.rank == adapter.modules[layer].rank
        torch.testing.assert_close(module.delta(), adapter.modules[layer].delta(), rtol=1e-4, atol=1e-5)
    assert set(result.errors.values()) == {0.0}


def test_fp16_loses_only_its_own_rounding(adapter: Adapter):
    halves = {
        layer: Module(module.kind, {slot: tensor.half() for slot, tensor in module.tensors.items()}, module.alpha)
        for layer, module in adapter.modules.items()
    }
    for layer, module in resize(Adapter(halves), Rule(64), "x").adapter.modules.items():
        assert {tensor.dtype for tensor in module.tensors.values()} == {torch.float16}
        dense = halves[layer].delta()
        assert float((module.delta() - dense).norm() / dense.norm()) < 1e-3


def test_a_lokr_becomes_a_lora_of_the_given_rank():
    torch.manual_seed(0)
    lokr = Module("lokr", {"lokr_w1": torch.randn(4, 5), "lokr_w2": torch.randn(8, 8)}, None)
    result = resize(Adapter({TO_Q: lokr}), Rule(6), "x")
    u, s, vh = torch.linalg.svd(torch.kron(lokr.tensors["lokr_w1"], lokr.tensors["lokr_w2"]), full_matrices=False)
    best = (u[:, :6] * s[:6]) @ vh[:6]
    torch.testing.assert_close(result.adapter.modules[TO_Q].delta(), best, rtol=1e-3, atol=1e-3)
    assert result.errors["down_blocks.1"] == pytest.approx(float(s[6:].norm() / s.norm()), rel=1e-3)


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        (Rule(), "no target is set; use --rank, --energy or --ratio"),
        (Rule(rank=-1), "--rank -1: must be 0 or more"),
        (Rule(energy=1.5), r"--energy 1\.5: must be a number from 0 to 1"),
        (Rule(ratio=-0.1), r"--ratio -0\.1: must be a number from 0 to 1"),
    ],
)
def test_an_invalid_rule_is_refused(adapter: Adapter, rule: Rule, line: str):
    with pytest.raises(Refused, match=line):
        resize(adapter, rule, "x")


def test_non_finite_values_are_refused_with_their_layer(adapter: Adapter):
    broken = {slot: torch.full_like(tensor, math.inf) for slot, tensor in adapter.modules[TO_Q].tensors.items()}
    with pytest.raises(Refused, match=r"x: unet\..* has non-finite values"):
        resize(Adapter({TO_Q: Module("lora", broken, 4.0)}), Rule(4), "x")


def test_a_dora_without_its_base_is_refused(adapter: Adapter):
    dora = Module("lora", adapter.modules[TO_Q].tensors | {"dora_scale": torch.ones(1, 40)}, 4.0)
    with pytest.raises(Refused, match=r"x: unet\..* is DoRA, whose effect depends on the base; name the base with"):
        resize(Adapter({TO_Q: dora}), Rule(4), "x")
