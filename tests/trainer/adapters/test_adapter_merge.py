"""Merging against sums of dense deltas and against PEFT's own TIES and DARE."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import merge_utils

from scumble.configs.errors import Refused
from scumble.trainer.adapters.adapter import Adapter, Module, from_tensors, to_tensors
from scumble.trainer.adapters.factors import Reduction
from scumble.trainer.adapters.keys import ModulePath
from scumble.trainer.adapters.merge import METHODS, Input, Recipe, combine, merge, rank_stabilized, seed_at
from scumble.trainer.adapters.provenance import metadata_of_result, write_result
from scumble.trainer.system.safetensors_header import read_header

TO_K = ModulePath("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k")
CONV = ModulePath("unet", "up_blocks.0.resnets.1.conv1")
MID = ModulePath("unet", "mid_block.attentions.0.proj_in")
FC1 = ModulePath("text", "encoder.layers.0.mlp.fc1")


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(seed: int, out: int, rank: int, inputs: tuple[int, ...], alpha: float | None = None) -> Module:
    kernel = (1,) * (len(inputs) - 1)
    return Module("lora", {"lora_down": draw(seed, rank, *inputs), "lora_up": draw(-seed, out, rank, *kernel)}, alpha)


def adapter(seed: int, rank: int, alpha: float | None = None) -> Adapter:
    return Adapter(
        {
            TO_K: lora(seed, 24, rank, (768,), alpha),
            CONV: lora(seed + 1, 20, rank, (10, 3, 3), alpha),
            MID: lora(seed + 2, 16, rank, (16, 1, 1), alpha),
            FC1: lora(seed + 3, 40, rank, (30,), alpha),
        }
    )


def loha(seed: int, rank: int = 2) -> Module:
    shapes = {"hada_w1_a": (20, rank), "hada_w1_b": (rank, 90), "hada_w2_a": (20, rank), "hada_w2_b": (rank, 90)}
    return Module("loha", {name: draw(seed + n, *shape) for n, (name, shape) in enumerate(shapes.items())}, float(rank))


DORA = Module("lora", {**lora(1, 8, 2, (9,)).tensors, "dora_scale": draw(1, 1, 9)}, 1.0)


def test_a_linear_merge_is_exactly_the_weighted_sum_also_in_the_written_file():
    inputs = [
        Input("a", adapter(10, 4, 2.0), 0.7, {"mid_block": 0.5, "text": 0.0}),
        Input("b", adapter(20, 3, None), -1.5, {"up_blocks.0": 2.0}),
        Input("c", Adapter({TO_K: lora(5, 24, 6, (768,), 1.0)}), 0.25),
    ]
    result = merge(inputs, Recipe())
    for found in (result.adapter, from_tensors(to_tensors(result.adapter), {}, "x")):
        assert found.modules.keys() == {TO_K, CONV, MID, FC1}
        for layer, module in found.modules.items():
            expected = sum(
                one.weight * one.blocks.get(layer.block, 1.0) * one.adapter.modules[layer].delta()
                for one in inputs
                if layer in one.adapter.modules
            )
            assert isinstance(expected, torch.Tensor)
            torch.testing.assert_close(module.delta(), expected, rtol=1e-4, atol=1e-4)
    assert result.adapter.modules[TO_K].rank == 13 and result.adapter.modules[FC1].rank == 3
    assert result.adapter.modules[CONV].tensors["lora_down"].shape == (7, 10, 3, 3)
    assert result.adapter.modules[CONV].tensors["lora_up"].shape == (20, 7, 1, 1)
    assert set(result.errors.values()) == {0.0}


def test_blocks_are_named_after_parts_of_the_model():
    assert [layer.block for layer in (TO_K, CONV, MID, FC1)] == ["down_blocks.1", "up_blocks.0", "mid_block", "text"]
    assert [ModulePath("text2", "encoder.layers.0.mlp.fc1").block, ModulePath("unet", "conv_in").block] == [
        "text2",
        "conv_in",
    ]


def test_an_svd_merge_is_the_best_approximation_of_the_given_rank_or_of_the_largest_input_rank():
    inputs = [Input("a", adapter(10, 4), 1.0), Input("b", adapter(20, 3), 0.5)]
    for rank, expected_rank in ((0, 4), (2, 2)):
        result = merge(inputs, Recipe("svd", rank=rank))
        lost, total = 0.0, 0.0
        for layer, module in result.adapter.modules.items():
            dense = inputs[0].adapter.modules[layer].delta() + 0.5 * inputs[1].adapter.modules[layer].delta()
            u, s, vh = torch.linalg.svd(dense, full_matrices=False)
            best = (u[:, :expected_rank] * s[:expected_rank]) @ vh[:expected_rank]
            assert module.rank == expected_rank
            torch.testing.assert_close(module.delta(), best, rtol=1e-3, atol=1e-3)
            if layer == FC1:
                lost, total = float((dense - module.delta()).norm()), float(dense.norm())
        assert result.errors["text"] == pytest.approx(lost / total, rel=1e-3)


@pytest.mark.parametrize("density", [0.2, 0.75, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 1.5, -0.7)])
def test_ties_equals_pefts_ties_on_weighted_deltas(density: float, weights: tuple[float, ...]):
    deltas = [draw(n, 20, 30) for n in range(3)]
    weighted = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    theirs = merge_utils.ties(weighted, torch.ones(3), density)
    torch.testing.assert_close(combine(deltas, weights, Recipe("ties", density=density), TO_K), theirs)


@pytest.mark.parametrize("density", [0.3, 0.9, 1.0])
def test_dare_equals_pefts_dare_with_the_same_random_numbers(density: float):
    deltas, weights = [draw(n, 20, 30) for n in range(3)], (0.5, 1.5, 1.0)
    weighted = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    methods: list[tuple[str, Any]] = [("dare", merge_utils.dare_linear), ("dare_ties", merge_utils.dare_ties)]
    for method, peft in methods:
        torch.manual_seed(seed_at(TO_K, 7))
        theirs = peft(weighted, torch.ones(3), density)
        ours = combine(deltas, weights, Recipe(method, density=density, seed=7), TO_K)
        torch.testing.assert_close(ours, theirs)


def test_dare_preserves_the_sum_on_average_and_is_reproducible_with_its_seed():
    deltas, weights = [torch.ones(200, 200), 2 * torch.ones(200, 200)], (1.0, 0.5)
    recipe = Recipe("dare", density=0.25, seed=1)
    found = combine(deltas, weights, recipe, TO_K)
    assert float(found.mean()) == pytest.approx(2.0, abs=0.05)
    assert torch.equal(found, combine(deltas, weights, recipe, TO_K))
    assert not torch.equal(found, combine(deltas, weights, Recipe("dare", density=0.25, seed=2), TO_K))
    assert not torch.equal(found, combine(deltas, weights, recipe, CONV))


def test_ties_and_dare_give_the_best_lora_of_their_dense_result():
    inputs = [Input("a", adapter(10, 4), 1.0), Input("b", adapter(20, 3), 0.5)]
    for method in ("ties", "dare", "dare_ties"):
        recipe = Recipe(method, rank=5, density=0.6, seed=3)
        result = merge(inputs, recipe)
        for layer, module in result.adapter.modules.items():
            dense = combine([one.adapter.modules[layer].delta() for one in inputs], [1.0, 0.5], recipe, layer)
            u, s, vh = torch.linalg.svd(dense, full_matrices=False)
            torch.testing.assert_close(module.delta(), (u[:, :5] * s[:5]) @ vh[:5], rtol=1e-3, atol=1e-3)
        assert 0 < result.errors["text"] < 1


def test_a_loha_is_merged_by_its_dense_delta_with_the_kernel_of_its_layer():
    inputs = [Input("a", adapter(10, 4)), Input("b", Adapter({CONV: loha(3)}), 0.1)]
    result = merge(
        inputs, Recipe("svd", rank=8)
    )  # a LoHa of rank 2 is a LoRA of rank 4, and 4 + 4 = 8, so nothing is lost
    dense = inputs[0].adapter.modules[CONV].delta() + 0.1 * loha(3).delta()
    torch.testing.assert_close(result.adapter.modules[CONV].delta(), dense, rtol=1e-3, atol=1e-3)
    alone = merge([Input("b", Adapter({CONV: loha(3)}))], Recipe("svd", rank=4)).adapter.modules[CONV]
    assert alone.tensors["lora_down"].shape == (4, 10, 3, 3)
    torch.testing.assert_close(alone.delta(), loha(3).delta(), rtol=1e-3, atol=1e-3)
    with pytest.raises(Refused, match=r"b: unet\..*conv1 is LoHa, which has no LoRA rank; set --rank"):
        merge(inputs, Recipe("svd"))


def test_a_tucker_core_is_merged_exactly():
    tensors = {"lora_down": draw(1, 4, 10, 1, 1), "lora_up": draw(2, 20, 4, 1, 1), "lora_mid": draw(3, 4, 4, 3, 3)}
    core = Adapter({CONV: Module("lora", tensors, 2.0)})
    result = merge([Input("a", core), Input("b", adapter(10, 3))], Recipe()).adapter.modules[CONV]
    expected = core.modules[CONV].delta() + adapter(10, 3).modules[CONV].delta()
    torch.testing.assert_close(result.delta(), expected, rtol=1e-4, atol=1e-4)
    assert result.rank == 7 and result.tensors["lora_down"].shape == (7, 10, 3, 3)


def test_rank_stabilized_scales_are_alpha_divided_by_the_square_root_of_the_rank():
    one = adapter(10, 4, 2.0)
    for layer, module in rank_stabilized(one).modules.items():
        assert module.scale == pytest.approx(2.0 / 4**0.5)
        torch.testing.assert_close(module.delta(), one.modules[layer].delta() * 2, rtol=1e-5, atol=1e-5)


def test_fp16_inputs_give_an_fp16_result():
    halves = {
        layer: Module("lora", {slot: tensor.half() for slot, tensor in module.tensors.items()}, 4.0)
        for layer, module in adapter(10, 4).modules.items()
    }
    merged = merge([Input("a", Adapter(halves)), Input("b", Adapter(halves), 0.5)], Recipe("svd", rank=4)).adapter
    for layer, module in merged.modules.items():
        assert {tensor.dtype for tensor in module.tensors.values()} == {torch.float16}
        expected = 1.5 * Module("lora", halves[layer].tensors, 4.0).delta()
        assert float((module.delta() - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize(
    ("inputs", "recipe", "line"),
    [
        ([Input("a", adapter(1, 2), 1.0, {"mid_blok": 1.0})], Recipe(), r"mid_blok.*did you mean mid_block\?"),
        ([Input("a", adapter(1, 2)), Input("b", Adapter({}, {}, "sdxl"))], Recipe(), "b: made for sdxl, but a is "),
        ([Input("a", adapter(1, 2), float("nan"))], Recipe(), "a: its weight or a block factor is not finite"),
        ([Input("a", adapter(1, 2), 0.0)], Recipe(), "--weights: all weights are 0, so the result is empty"),
        ([Input("a", adapter(1, 2))], Recipe("tie"), r"--method tie: must be .*did you mean ties\?"),
        ([Input("a", adapter(1, 2))], Recipe("dare", density=0.0), "--density 0: must be above 0"),
        ([Input("a", adapter(1, 2))], Recipe("linear", rank=4), "linear method keeps all ranks; use --method svd"),
        ([Input("a", adapter(1, 2)), Input("b", Adapter({TO_K: lora(1, 8, 2, (768,))}))], Recipe(),
         r"attn2\.to_k: is 24 x 768 and 8 x 768 in the files"),
        *(([Input("a", adapter(1, 2)), Input("b", adapter(1, 2, float("nan")))], Recipe(method),
           "b: .* has non-finite values") for method in METHODS),
        ([Input("a", Adapter({TO_K: DORA}))], Recipe(),
         r"a: unet\..*attn2.to_k is DoRA, whose effect depends on the base; name the base with --base FILE"),
    ],
)  # fmt: skip
def test_invalid_merges_are_refused_in_one_line(inputs: list[Input], recipe: Recipe, line: str):
    with pytest.raises(Refused, match=line) as error:
        merge(inputs, recipe)
    assert "\n" not in str(error.value)


def test_metadata_keeps_the_base_joins_the_triggers_and_has_no_file_paths(tmp_path: Path):
    first = Adapter({}, {
        "ss_base_model_version": "sd_v2", "modelspec.architecture": "stable-diffusion-v2-512/lora",
        "ss_sd_model_name": r"C:\Users\jo\models\base.safetensors", "modelspec.trigger_phrase": "clay",
        "ss_dataset_dirs": json.dumps({"/home/jo/pictures": {}}), "lora_adapter_metadata": "{}", "ss_steps": "10",
    }, "sd2")  # fmt: skip
    second = Adapter({}, {"modelspec.trigger_phrase": "paper"}, "sd2")
    result = Adapter(adapter(1, 6).modules, {}, "sd2")
    lines = write_result(
        Reduction(result, {"text": 0.25, "mid_block": 0.5}), [first, second], tmp_path / "both", "x", True
    )
    metadata = read_header(tmp_path / "both").metadata
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-512/lora" and metadata["ss_v2"] == "True"
    assert metadata["ss_sd_model_name"] == "base.safetensors" and metadata["modelspec.trigger_phrase"] == "clay, paper"
    assert (
        metadata["ss_network_dim"] == "6"
        and metadata["ss_network_alpha"] == "6"
        and metadata["ss_output_name"] == "both"
    )
    assert not {"ss_dataset_dirs", "lora_adapter_metadata", "ss_steps"} & metadata.keys()
    assert not any("/home" in value or "Users" in value for value in metadata.values())
    assert [line.split()[0] for line in lines[:2]] == ["mid_block", "text"] and "50.0%" in lines[0]
    assert lines[2] == "removed file paths from the metadata: ss_sd_model_name"


def test_a_result_without_parent_metadata_gets_that_of_its_family(tmp_path: Path):
    metadata = metadata_of_result([Adapter({}, {}, "sdxl")], Adapter(adapter(1, 2).modules, {}, "sdxl"), "x", "resized")
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
