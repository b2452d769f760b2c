"""Linear token projections and attention processors, compared with those of diffusers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from small_parts import unet
from torch.profiler import ProfilerActivity, profile

from scumble.trainer.base_model.projection import project_tokens
from scumble.trainer.kernels import attention
from scumble.trainer.kernels.attention import use_joint_qkv, use_matmul_attention
from scumble.trainer.kernels.lora_matmul import is_plain, joint_linear, use_fast_lora
from scumble.trainer.training.flat_parameters import FlatParameters
from scumble.trainer.training.lora import ADAPTER, AdaptedLayer, memory_order


def outputs_and_gradients(model: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output of a pass, and the gradients of image and text."""
    torch.manual_seed(1)
    x, text = (torch.randn(2, 4, 8, 8).requires_grad_(True), torch.randn(2, 7, 24).requires_grad_(True))
    out = model.to(dtype)(x.to(dtype), torch.tensor([3, 700]), text.to(dtype)).sample.float()
    out.square().sum().backward()
    assert x.grad is not None and text.grad is not None
    return [out.detach(), x.grad, text.grad]


def test_linear_projections_give_the_outputs_and_gradients_of_the_convolutions():
    theirs, ours = unet(), unet()
    assert project_tokens(ours) == 8  # the input and output of four blocks
    assert not any(isinstance(one, torch.nn.Conv2d) for name, one in ours.named_modules() if "proj_" in name)
    exact = outputs_and_gradients(theirs, torch.float32)
    for our, right in zip(outputs_and_gradients(ours, torch.float32), exact, strict=True):
        torch.testing.assert_close(our, right, rtol=1e-4, atol=1e-5)
    in_bf16 = [outputs_and_gradients(model, torch.bfloat16) for model in (ours, theirs)]
    for our, their, right in zip(*in_bf16, exact, strict=True):
        assert (our - right).norm() < 1.5 * (their - right).norm()  # in bf16 the error is not much larger


def test_projections_that_are_trained_adapted_or_already_linear_are_not_replaced():
    trained = unet()
    trained.mid_block.attentions[0].proj_in.requires_grad_(True)
    assert project_tokens(trained) == 6
    adapted = unet()
    block = adapted.mid_block.attentions[0]
    block.proj_out = torch.nn.Sequential(block.proj_out)
    assert project_tokens(adapted) == 6 and not block.use_linear_projection
    assert project_tokens(unet(linear=True)) == 0


def test_transposed_tokens_need_one_product_instead_of_one_per_image():
    ours = unet()
    project_tokens(ours)
    block = ours.mid_block.attentions[0]
    transposed = torch.randn(2, 32, 16).transpose(1, 2).requires_grad_(True)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        block.proj_in(transposed).square().sum().backward()
    names = {event.key for event in profiled.key_averages()}
    assert "aten::bmm" not in names and {"aten::addmm", "aten::mm"} <= names


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_and_their_gradients_match_diffusers(dtype: torch.dtype):
    theirs, ours = unet(), unet()
    theirs.set_attn_processor(AttnProcessor())
    use_matmul_attention(ours)
    if dtype == torch.float64:
        for our, their in zip(outputs_and_gradients(ours, dtype), outputs_and_gradients(theirs, dtype), strict=True):
            torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-7)
        return
    exact = outputs_and_gradients(unet(), torch.float32)
    in_bf16 = [outputs_and_gradients(model, dtype) for model in (ours, theirs)]
    for our, their, right in zip(*in_bf16, exact, strict=True):
        assert (our - right).norm() < 1.5 * (their - right).norm()  # the error is not much larger


@pytest.mark.parametrize("feature", ["mask", "upcast_softmax", "upcast_attention", "none"])
def test_scores_with_a_mask_or_in_fp32_are_left_to_diffusers(feature: str, monkeypatch: pytest.MonkeyPatch):
    calls: list[bool] = []
    apply = attention._Scores.apply
    monkeypatch.setattr(attention._Scores, "apply", lambda *args: calls.append(True) or apply(*args))
    torch.manual_seed(0)
    ours, theirs = unet(), unet()
    use_matmul_attention(ours)
    our, their = (next(one for one in model.modules() if isinstance(one, Attention)) for model in (ours, theirs))
    if feature.startswith("upcast"):
        for layer in (our, their):
            setattr(layer, feature, True)
    mask = torch.full((2, 5, 7), -torch.inf).index_fill_(2, torch.tensor([0, 1]), 0) if feature == "mask" else None
    inputs = torch.randn(2, 5, 4), torch.randn(2, 7, 4), mask
    torch.testing.assert_close(our.get_attention_scores(*inputs), their.get_attention_scores(*inputs))
    assert calls == [True] * (feature == "none")


@pytest.mark.parametrize("targets", ["attention", "values only"])
@pytest.mark.parametrize("use_attention", [use_matmul_attention, use_joint_qkv])
def test_attention_with_adapted_layers_matches_diffusers_and_peft(
    targets: str, use_attention: Callable[[UNet2DConditionModel], None], monkeypatch: pytest.MonkeyPatch
):
    """q, k and v of image tokens are joined, and k and v of the text, but only if all of them have an adapter."""
    joined: set[tuple[int, bool]] = set()

    def recorded(layers: Any, x: torch.Tensor) -> torch.Tensor | None:
        product = joint_linear(layers, x)
        joined.add((len(layers), product is not None))
        return product

    monkeypatch.setattr(attention, "joint_linear", recorded)
    names = ["to_q", "to_k", "to_v", "to_out.0"] if targets == "attention" else ["to_v"]
    results = []
    for is_ours in (False, True):
        model = unet()
        inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=names), model, ADAPTER)
        modules = [
            AdaptedLayer("unet", path, "sd1", one) for path, one in model.named_modules() if isinstance(one, LoraLayer)
        ]
        factors = memory_order(modules)
        torch.manual_seed(2)
        for factor in factors:
            torch.nn.init.normal_(factor, std=0.2).requires_grad_(True)
        if is_ours:
            use_attention(model)
            use_fast_lora([one.layer for one in modules], ADAPTER, FlatParameters([factors]).lowered)
        else:
            model.set_attn_processor(AttnProcessor())
        results.append([*outputs_and_gradients(model, torch.float32), *(factor.grad for factor in factors)])
    sizes = {3} if use_attention is use_matmul_attention else {2, 3}
    assert joined == {(size, targets == "attention") for size in sizes}
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "feature", ["none", "mask", "residual_connection", "rescale_output_factor", "dropout", "qk_norm"]
)
@pytest.mark.parametrize("use_attention", [use_matmul_attention, use_joint_qkv])
def test_attention_with_features_that_unets_do_not_use_is_left_to_diffusers(
    feature: str, use_attention: Callable[[Any], None]
):
    values: dict[str, Any] = {"residual_connection": True, "rescale_output_factor": 2.0, "qk_norm": "rms_norm"}
    options = {feature: values[feature]} if feature in values else {}
    results = []
    for is_ours in (False, True):
        torch.manual_seed(0)
        layer: Any = Attention(8, heads=2, dim_head=4, dropout=1.0 if feature == "dropout" else 0.0, **options)
        layer.requires_grad_(False)
        model: Any = torch.nn.ModuleDict({"attn": layer})
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]), model, ADAPTER)
        factors = memory_order(
            AdaptedLayer("unet", f"x.attn1.{name}", "sd1", layer.get_submodule(name))
            for name in ("to_q", "to_k", "to_v")
        )
        for factor in factors:
            torch.nn.init.normal_(factor)
        layer.set_processor(AttnProcessor() if use_attention is use_matmul_attention else AttnProcessor2_0())
        if is_ours:
            use_attention(model)
            use_fast_lora([layer.to_q, layer.to_k, layer.to_v], ADAPTER, FlatParameters([factors]).lowered)
        mask = torch.tensor([[[0.0, -9.0, 0.0]]]).expand(2, 3, 3) if feature == "mask" else None
        torch.manual_seed(1)
        x = torch.randn(2, 3, 8)
        results.append(layer(x, attention_mask=mask))
    torch.testing.assert_close(results[1], results[0])


def test_torch_compile_traces_a_block_as_one_graph_with_the_same_output():
    torch.manual_seed(0)
    model: Any = torch.nn.ModuleDict({"block": BasicTransformerBlock(8, 2, 4, cross_attention_dim=6)})
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), model, ADAPTER)
    factors = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for factor in factors:
        torch.nn.init.normal_(factor, std=0.3)
    use_matmul_attention(model)
    use_fast_lora([one for one in model.modules() if is_plain(one)], ADAPTER, FlatParameters([factors]).lowered)
    x, text = torch.randn(2, 5, 8), torch.randn(2, 7, 6)
    expected = model.block(x, encoder_hidden_states=text)
    compiled: Any = torch.compile(model.block, backend="eager", fullgraph=True)
    try:
        torch.testing.assert_close(compiled(x, encoder_hidden_states=text), expected, rtol=1e-4, atol=1e-5)
    finally:
        torch.compiler.reset()
