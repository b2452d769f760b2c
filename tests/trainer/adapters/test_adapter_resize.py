"""Resizing against dense SVDs; what a smaller rank costs is what the report says."""

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


def falling(out: int, inputs: tuple[int, ...], rank: int, fall: float) -> Module:
    """A LoRA whose singular values are fall^0, fall^1, …"""
    u, v = torch.linalg.qr(torch.randn(out, rank))[0], torch.linalg.qr(torch.randn(math.prod(inputs), rank))[0]
    down = (v * fall ** torch.arange(rank).float()).T.reshape(rank, *inputs)
    return Module("lora", {"lora_down": down, "lora_up": u.reshape(out, rank, *(1 for _ in inputs[1:]))}, rank / 2)


@pytest.fixture
def adapter() -> Adapter:
    torch.manual_seed(0)
    modules = {
        TO_Q: falling(32, (40,), 8, 0.5),
        TO_K: falling(24, (768,), 8, 0.9),
        CONV: falling(20, (10, 3, 3), 6, 0.7),
    }
    return Adapter(modules, {"ss_output_name": "x"})


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_fixed_rank_is_the_best_one_and_the_report_its_error(adapter: Adapter, rank: int):
    result = resize(adapter, Rule(rank), "x")
    lost: dict[str, float] = {}
    total: dict[str, float] = {}
    written = from_tensors(to_tensors(result.adapter), {}, "x")
    for place, module in adapter.modules.items():
        dense = module.delta()
        s = torch.linalg.svdvals(dense)
        found = written.modules[place]
        assert found.rank == rank and found.tensors["lora_down"].shape[1:] == module.tensors["lora_down"].shape[1:]
        error = float((dense - found.delta()).norm())
        assert error == pytest.approx(float(s[rank:].norm()), rel=1e-3, abs=1e-5)
        lost[place.block] = lost.get(place.block, 0.0) + error**2
        total[place.block] = total.get(place.block, 0.0) + float(dense.norm()) ** 2
    assert result.errors.keys() == {"down_blocks.1", "up_blocks.0"}
    for block, error in result.errors.items():
        assert error == pytest.approx(math.sqrt(lost[block] / total[block]), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_by_energy_every_layer_gets_the_least_rank_that_keeps_enough(adapter: Adapter, share: float):
    result = resize(adapter, Rule(energy=share), "x")
    for place, module in result.adapter.modules.items():
        squares = torch.linalg.svdvals(adapter.modules[place].delta()).square()
        assert float(squares[: module.rank].sum() / squares.sum()) >= share - 1e-5
        assert float(squares[: module.rank - 1].sum() / squares.sum()) < share
    assert result.rank == max(module.rank for module in result.adapter.modules.values())
    assert all(error <= math.sqrt(1 - share) + 1e-4 for error in result.errors.values())


def test_by_ratio_small_singular_values_are_dropped_and_a_limit_holds(adapter: Adapter):
    ranks = {place: module.rank for place, module in resize(adapter, Rule(ratio=0.2), "x").adapter.modules.items()}
    assert ranks == {TO_Q: 3, TO_K: 8, CONV: 5}  # 0.5² = 0.25, 0.9⁷ = 0.48, 0.7⁴ = 0.24
    limited = resize(adapter, Rule(rank=4, ratio=0.2), "x").adapter.modules
    assert [limited[place].rank for place in (TO_Q, TO_K, CONV)] == [3, 4, 4]


def test_a_rank_is_not_made_larger_and_then_nothing_is_lost(adapter: Adapter):
    result = resize(adapter, Rule(64), "x")
    for place, module in result.adapter.modules.items():
        assert module.rank == adapter.modules[place].rank
        torch.testing.assert_close(module.delta(), adapter.modules[place].delta(), rtol=1e-4, atol=1e-5)
    assert set(result.errors.values()) == {0.0}


def test_half_precision_costs_no_more_than_its_own_rounding(adapter: Adapter):
    halves = {
        place: Module(module.kind, {slot: tensor.half() for slot, tensor in module.tensors.items()}, module.alpha)
        for place, module in adapter.modules.items()
    }
    for place, module in resize(Adapter(halves), Rule(64), "x").adapter.modules.items():
        assert {tensor.dtype for tensor in module.tensors.values()} == {torch.float16}
        dense = halves[place].delta()
        assert float((module.delta() - dense).norm() / dense.norm()) < 1e-3


def test_a_lokr_becomes_a_lora_of_the_rank():
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
        (Rule(), "say how far to reduce: --rank, --energy or --ratio"),
        (Rule(rank=-1), "--rank -1: use 1 or more"),
        (Rule(energy=1.5), r"--energy 1\.5: a share is between 0 and 1"),
        (Rule(ratio=-0.1), r"--ratio -0\.1: a share is between 0 and 1"),
    ],
)
def test_an_impossible_rule_is_one_line(adapter: Adapter, rule: Rule, line: str):
    with pytest.raises(Refused, match=line):
        resize(adapter, rule, "x")


def test_numbers_that_are_not_finite_are_refused_by_their_layer(adapter: Adapter):
    spoiled = {slot: torch.full_like(tensor, math.inf) for slot, tensor in adapter.modules[TO_Q].tensors.items()}
    with pytest.raises(Refused, match=r"x: unet\..* holds numbers that are not finite"):
        resize(Adapter({TO_Q: Module("lora", spoiled, 4.0)}), Rule(4), "x")


def test_a_dora_is_refused_with_what_to_do(adapter: Adapter):
    dora = Module("lora", adapter.modules[TO_Q].tensors | {"dora_scale": torch.ones(1, 40)}, 4.0)
    with pytest.raises(Refused, match=r"x: unet\..* is DoRA, whose change depends on its base; name it: --base FILE"):
        resize(Adapter({TO_Q: dora}), Rule(4), "x")
