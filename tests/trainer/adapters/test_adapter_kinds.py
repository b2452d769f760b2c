"""LoHa, LoKr and DoRA against PEFT's own layers: deltas, merging, resizing and baking."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file

from scumble.configs.errors import Refused
from scumble.trainer.adapters.adapter import Adapter, from_tensors
from scumble.trainer.adapters.bake import BakedAdapter, bake
from scumble.trainer.adapters.factors import factors_of
from scumble.trainer.adapters.keys import ModulePath
from scumble.trainer.adapters.lowrank import Rule, svd_of_kronecker
from scumble.trainer.adapters.merge import Input, Recipe, merge
from scumble.trainer.adapters.module import Module
from scumble.trainer.adapters.resize import resize
from scumble.trainer.adapters.weights import Weights, find_weights

TO_Q = ModulePath("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
CONV = ModulePath("unet", "mid_block.resnets.0.conv1")
CHECKPOINT = {TO_Q: "middle_block.1.transformer_blocks.0.attn1.to_q", CONV: "middle_block.0.in_layers.2"}
KINDS = ["lora", "loha", "loha-core", "lokr", "lokr-factored", "lokr-core"]


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = torch.nn.Linear(48, 64, bias=False)
        self.conv = torch.nn.Conv2d(24, 32, 3, bias=False)


def of_peft(kind: str, seed: int) -> tuple[Adapter, dict[ModulePath, torch.Tensor]]:
    """A random adapter on a Linear layer and a convolution, and the deltas that PEFT's layers compute."""
    torch.manual_seed(seed)
    shared: dict[str, Any] = {"target_modules": ["to_q", "conv"]}
    config = {
        "lora": LoraConfig(r=3, lora_alpha=6, **shared),
        "loha": LoHaConfig(r=3, alpha=2, **shared),
        "loha-core": LoHaConfig(r=3, alpha=2, use_effective_conv2d=True, **shared),
        "lokr": LoKrConfig(r=64, alpha=64, **shared),
        "lokr-factored": LoKrConfig(r=2, alpha=1, decompose_factor=4, **shared),
        "lokr-core": LoKrConfig(r=2, alpha=1, decompose_factor=4, use_effective_conv2d=True, **shared),
    }[kind]
    model = Small()
    inject_adapter_in_model(config, model, "it")
    for name, parameter in model.named_parameters():
        if any(word in name for word in ("lora_", "hada_", "lokr_")):
            parameter.data = 0.3 * torch.randn(parameter.shape)
    modules, deltas = {}, {}
    for layer, peft_layer in ((TO_Q, model.to_q), (CONV, model.conv)):
        modules[layer], deltas[layer] = read(peft_layer)
    return Adapter(modules), deltas


def read(layer: Any) -> tuple[Module, torch.Tensor]:
    delta = layer.get_delta_weight("it").detach()
    alpha = layer.scaling["it"] * layer.r["it"]
    if hasattr(layer, "lora_A"):
        down, up = (part["it"].weight.detach() for part in (layer.lora_A, layer.lora_B))
        return Module("lora", {"lora_down": down, "lora_up": up}, alpha), delta
    slots = [slot for slot in layer.adapter_layer_names if "it" in getattr(layer, slot)]
    return Module(slots[0].partition("_")[0].replace("hada", "loha"), {
        slot: getattr(layer, slot)["it"].detach() for slot in slots
    }, alpha), delta  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_exact_factors_equal_those_of_pefts_delta(kind: str):
    adapter, deltas = of_peft(kind, 0)
    for layer, module in adapter.modules.items():
        delta = deltas[layer].flatten(1)
        torch.testing.assert_close(module.delta(), delta, rtol=1e-4, atol=1e-5)
        assert module.shape == delta.shape
        factors = factors_of(module)
        if kind == "lokr":  # two dense factors have no low-rank form
            assert factors is None
        else:
            assert factors and len(factors.down) < min(delta.shape)
            torch.testing.assert_close(factors.up @ factors.down, delta, rtol=1e-4, atol=1e-5)


def test_factors_with_invalid_shapes_are_refused_by_name():
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    ones = torch.ones
    for tensors, line in (
        (
            {"lora_down.weight": ones(3, 8), "lora_up.weight": ones(8, 2)},
            "proj_in has factors whose shapes do not match",
        ),
        ({"lora_down.weight": ones(8), "lora_up.weight": ones(8, 2)}, r"has lora_down of shape \(8,\)"),
        ({"lora_down.weight": ones(0, 8), "lora_up.weight": ones(8, 0)}, r"has lora_down of shape \(0, 8\)"),
        ({"hada_w1_a": ones(8, 2), "hada_w1_b": ones(2, 8), "hada_w2_a": ones(8, 2), "hada_w2_b": ones(2, 9)}, "match"),
        ({"lokr_w1": ones(4, 4)}, "proj_in is missing lokr_w2"),
        ({"lokr_w1_a": ones(4, 4), "lokr_w2": ones(4, 4)}, "proj_in is missing lokr_w1"),
        (
            {"lokr_w1": ones(999, 999), "lokr_w2": ones(999, 999)},
            "is 998001 x 998001, larger than any Stable Diffusion",
        ),
        ({"lora_down.weight": ones(1, 99999), "lora_up.weight": ones(99999, 1)}, "larger than any Stable Diffusion"),
        ({"lora_down.weight": ones(2, 8), "lora_up.weight": ones(8, 2), "alpha": ones(2)}, "has 2 values for alpha"),
        ({"diff_b": ones(8)}, "proj_in is missing diff"),
    ):
        with pytest.raises(Refused, match=line):
            from_tensors({f"{stem}.{slot}": tensor for slot, tensor in tensors.items()}, {}, "x")


def test_the_svd_of_a_kronecker_product_equals_the_dense_svd():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(5, 4, generator=generator), torch.randn(6, 9, generator=generator)
    found = svd_of_kronecker(first, second)
    dense = torch.kron(first, second)
    torch.testing.assert_close(found.s, torch.linalg.svdvals(dense)[:24], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((found.u * found.s) @ found.vh, dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.u.T @ found.u, torch.eye(24), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_merge_of_any_kind_is_exactly_the_sum_of_pefts_deltas(kind: str):
    one, deltas = of_peft("lora", 1)
    other, others = of_peft(kind, 2)
    result = merge([Input("a", one, 0.5), Input("b", other, -2.0)], Recipe()).adapter
    for layer, module in result.modules.items():
        expected = 0.5 * deltas[layer] - 2.0 * others[layer]
        assert module.kind == "lora" and module.rank <= min(expected.flatten(1).shape)
        assert module.tensors["lora_down"].shape[2:] == expected.shape[2:]
        torch.testing.assert_close(module.delta(), expected.flatten(1), rtol=1e-4, atol=1e-5)
    if kind == "loha":
        assert {module.rank for module in result.modules.values()} == {3 + 9}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [Rule(4), Rule(energy=0.8), Rule(6, energy=0.95)])
def test_resizing_any_kind_gives_the_best_lora_and_its_error(kind: str, rule: Rule):
    adapter, deltas = of_peft(kind, 0)
    result = resize(adapter, rule, "x")
    lost = total = 0.0
    for layer, module in result.adapter.modules.items():
        dense = deltas[layer].flatten(1)
        s = torch.linalg.svdvals(dense)
        error = float((dense - module.delta()).norm())
        assert error == pytest.approx(float(s[module.rank :].norm()), rel=1e-2, abs=1e-4)
        enough = s.square().cumsum(0) / s.square().sum() >= rule.energy
        least = int((~enough).sum()) + 1 if rule.energy else rule.rank
        assert module.rank == min(least, rule.rank or least, int((s > 1e-5 * s[0]).sum()))
        lost, total = lost + error**2, total + float(dense.norm()) ** 2
    assert result.errors["mid_block"] == pytest.approx((lost / total) ** 0.5, rel=1e-2, abs=1e-4)


@pytest.fixture
def base(tmp_path: Path) -> Weights:
    """A checkpoint with only the two layers."""
    generator = torch.Generator().manual_seed(5)
    shapes = {TO_Q: (64, 48), CONV: (32, 24, 3, 3)}
    tensors = {
        f"model.diffusion_model.{name}.weight": torch.randn(shapes[layer], generator=generator)
        for layer, name in CHECKPOINT.items()
    }
    save_file(tensors, tmp_path / "base.safetensors")
    return find_weights(tmp_path / "base.safetensors")


def dora(base: Weights, by_inputs: bool) -> tuple[Adapter, dict[ModulePath, torch.Tensor]]:
    """A DoRA, and the change of each weight by equation 5, written out column by column (or row by row)."""
    adapter, deltas = of_peft("lora", 3)
    modules, changes = {}, {}
    for layer, module in adapter.modules.items():
        weight = base.read(layer)
        ones = [1] * (weight.dim() - 2)
        axis = 1 if by_inputs else 0
        shape = [1, weight.shape[1], *ones] if by_inputs else [weight.shape[0], 1, *ones]
        magnitude = 1 + torch.rand(weight.shape[axis], generator=torch.Generator().manual_seed(7))
        modules[layer] = Module("lora", module.tensors | {"dora_scale": magnitude.reshape(shape)}, module.alpha)
        columns = (weight + deltas[layer]).unbind(axis)
        scaled = [m * column / column.norm() for m, column in zip(magnitude, columns, strict=True)]
        changes[layer] = torch.stack(scaled, axis) - weight
    return Adapter(modules), changes


@pytest.mark.parametrize("by_inputs", [True, False])
def test_dora_is_merged_and_resized_as_the_change_it_makes_to_its_base(base: Weights, by_inputs: bool, tmp_path: Path):
    adapter, changes = dora(base, by_inputs)
    other, deltas = of_peft("lora", 4)
    merged = merge([Input("a", adapter, 0.7), Input("b", other)], Recipe(), base).adapter
    small = resize(adapter, Rule(4), "x", base).adapter
    kept = resize(adapter, Rule(energy=0.9), "x", base)
    assert 0.2 < kept.errors["mid_block"] <= 0.1**0.5 + 1e-4
    for layer, change in changes.items():
        expected = (0.7 * change + deltas[layer]).flatten(1)
        torch.testing.assert_close(merged.modules[layer].delta(), expected, rtol=1e-4, atol=1e-5)
        assert "dora_scale" not in merged.modules[layer].tensors
        u, s, vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
        best = (u[:, :4] * s[:4]) @ vh[:4]
        torch.testing.assert_close(small.modules[layer].delta(), best, rtol=1e-3, atol=1e-3)
    bake(base.path, tmp_path / "one.safetensors", [BakedAdapter("a", adapter, 0.7), BakedAdapter("b", other)])
    bake(base.path, tmp_path / "two.safetensors", [BakedAdapter("m", merged)])
    one, two = find_weights(tmp_path / "one.safetensors"), find_weights(tmp_path / "two.safetensors")
    for layer in changes:
        torch.testing.assert_close(one.read(layer), two.read(layer), rtol=1e-4, atol=1e-4)


def test_unsupported_modules_are_refused_in_one_line(base: Weights):
    adapter, _ = dora(base, by_inputs=True)
    foreign = Adapter({ModulePath("unet", "conv_in"): adapter.modules[TO_Q]})
    wrong = Adapter({TO_Q: Module("lora", adapter.modules[TO_Q].tensors | {"dora_scale": torch.ones(9, 1)}, 1.0)})
    lora, _ = of_peft("lora", 1)
    halves = {f"hada_w{n}_{letter}": torch.ones(600, 30) for n in (1, 2) for letter in "ab"}
    wide = Adapter({TO_Q: Module("loha", {n: t.T if n.endswith("b") else t for n, t in halves.items()}, 30.0)})
    biased = Adapter({TO_Q: Module("lora", lora.modules[TO_Q].tensors | {"diff_b": torch.ones(64)}, 1.0)})
    for one, rule, where, line in (
        (
            adapter,
            Rule(4),
            None,
            r"x: unet\.mid_block.* is DoRA, whose effect depends on the base; name the base with --base FILE",
        ),
        (foreign, Rule(4), base, r"x: unet\.conv_in is not in the base; .* a different base than .*\.safetensors"),
        (wrong, Rule(4), base, r"DoRA magnitudes of shape \(9, 1\), expected one per input or one per output"),
        (wide, Rule(energy=0.9), None, "is LoHa, which does not limit the rank; set --rank"),
        (biased, Rule(4), base, r"x: unet\..*to_q also changes a bias \(diff_b\), which is not supported"),
    ):
        with pytest.raises(Refused, match=line) as error:
            resize(one, rule, "x", where)
        assert "\n" not in str(error.value)
    with pytest.raises(Refused, match=r"a: unet\..* is DoRA, which has no LoRA rank; set --rank"):
        merge([Input("a", adapter)], Recipe("ties"), base)
