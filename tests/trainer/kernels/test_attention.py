"""Projections of tokens as Linear layers, and attention, against diffusers' own."""

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
from scumble.trainer.kernels.attention import attend_by_products, attend_jointly
from scumble.trainer.kernels.lora_matmul import is_plain, joint_linear, use_fast_lora
from scumble.trainer.training.flat_parameters import Flat
from scumble.trainer.training.lora import ADAPTER, AdaptedLayer, memory_order


def passed(model: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output of a pass, and its gradients to picture and text."""
    torch.manual_seed(1)
    x, text = (torch.randn(2, 4, 8, 8).requires_grad_(True), torch.randn(2, 7, 24).requires_grad_(True))
    out = model.to(dtype)(x.to(dtype), torch.tensor([3, 700]), text.to(dtype)).sample.float()
    out.square().sum().backward()
    assert x.grad is not None and text.grad is not None
    return [out.detach(), x.grad, text.grad]


def test_outputs_and_gradients_are_those_of_the_convolutions():
    theirs, ours = unet(), unet()
    assert project_tokens(ours) == 8  # before and after four blocks
    assert not any(isinstance(one, torch.nn.Conv2d) for name, one in ours.named_modules() if "proj_" in name)
    exact = passed(theirs, torch.float32)
    for one, other in zip(passed(ours, torch.float32), exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for ours_, theirs_, right in zip(passed(ours, torch.bfloat16), passed(theirs, torch.bfloat16), exact, strict=True):
        assert (ours_ - right).norm() < 1.5 * (theirs_ - right).norm()  # in bf16 no further from that


def test_what_learns_or_has_an_adapter_and_what_is_linear_already_stays():
    learns = unet()
    learns.mid_block.attentions[0].proj_in.requires_grad_(True)
    assert project_tokens(learns) == 6
    adapted = unet()
    block = adapted.mid_block.attentions[0]
    block.proj_out = torch.nn.Sequential(block.proj_out)
    assert project_tokens(adapted) == 6 and not block.use_linear_projection
    assert project_tokens(unet(linear=True)) == 0


def test_turned_tokens_are_one_product_and_not_one_a_picture():
    ours = unet()
    project_tokens(ours)
    block = ours.mid_block.attentions[0]
    turned = torch.randn(2, 32, 16).transpose(1, 2).requires_grad_(True)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        block.proj_in(turned).square().sum().backward()
    names = {event.key for event in seen.key_averages()}
    assert "aten::bmm" not in names and {"aten::addmm", "aten::mm"} <= names


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_and_their_gradients_are_those_of_diffusers(dtype: torch.dtype):
    theirs, ours = unet(), unet()
    theirs.set_attn_processor(AttnProcessor())
    attend_by_products(ours)
    if dtype == torch.float64:
        for one, other in zip(passed(ours, dtype), passed(theirs, dtype), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        return
    exact = passed(unet(), torch.float32)
    for ours_, theirs_, right in zip(passed(ours, dtype), passed(theirs, dtype), exact, strict=True):
        assert (ours_ - right).norm() < 1.5 * (theirs_ - right).norm()  # no further from that


@pytest.mark.parametrize("where", ["a mask", "upcast_softmax", "upcast_attention", "nothing"])
def test_scores_behind_a_mask_or_in_fp32_are_left_to_diffusers(where: str, monkeypatch: pytest.MonkeyPatch):
    taken: list[bool] = []
    apply = attention._Scores.apply
    monkeypatch.setattr(attention._Scores, "apply", lambda *given: taken.append(True) or apply(*given))
    torch.manual_seed(0)
    ours, theirs = unet(), unet()
    attend_by_products(ours)
    one, other = (next(one for one in model.modules() if isinstance(one, Attention)) for model in (ours, theirs))
    if where.startswith("upcast"):
        for layer in (one, other):
            setattr(layer, where, True)
    mask = torch.full((2, 5, 7), -torch.inf).index_fill_(2, torch.tensor([0, 1]), 0) if where == "a mask" else None
    given = torch.randn(2, 5, 4), torch.randn(2, 7, 4), mask
    torch.testing.assert_close(one.get_attention_scores(*given), other.get_attention_scores(*given))
    assert taken == [True] * (where == "nothing")


@pytest.mark.parametrize("targets", ["attention", "values only"])
@pytest.mark.parametrize("attend", [attend_by_products, attend_jointly])
def test_attention_of_adapted_layers_is_that_of_diffusers_and_peft(
    targets: str, attend: Callable[[UNet2DConditionModel], None], monkeypatch: pytest.MonkeyPatch
):
    """q, k and v of tokens together, and k and v of the text; where not all have an adapter, each by itself."""
    joined: set[tuple[int, bool]] = set()

    def noted(layers: Any, x: torch.Tensor) -> torch.Tensor | None:
        found = joint_linear(layers, x)
        joined.add((len(layers), found is not None))
        return found

    monkeypatch.setattr(attention, "together", noted)
    names = ["to_q", "to_k", "to_v", "to_out.0"] if targets == "attention" else ["to_v"]
    found = []
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
            attend(model)
            use_fast_lora([one.layer for one in modules], ADAPTER, Flat([factors]).lowered)
        else:
            model.set_attn_processor(AttnProcessor())
        found.append([*passed(model, torch.float32), *(factor.grad for factor in factors)])
    kinds = {3} if attend is attend_by_products else {2, 3}
    assert joined == {(kind, targets == "attention") for kind in kinds}
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "what", ["nothing", "a mask", "residual_connection", "rescale_output_factor", "dropout", "qk_norm"]
)
@pytest.mark.parametrize("attend", [attend_by_products, attend_jointly])
def test_attention_that_does_more_than_a_unet_asks_is_left_to_diffusers(what: str, attend: Callable[[Any], None]):
    more: dict[str, Any] = {"residual_connection": True, "rescale_output_factor": 2.0, "qk_norm": "rms_norm"}
    options = {what: more[what]} if what in more else {}
    found = []
    for is_ours in (False, True):
        torch.manual_seed(0)
        layer: Any = Attention(8, heads=2, dim_head=4, dropout=1.0 if what == "dropout" else 0.0, **options)
        layer.requires_grad_(False)
        model: Any = torch.nn.ModuleDict({"attn": layer})
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]), model, ADAPTER)
        factors = memory_order(
            AdaptedLayer("unet", f"x.attn1.{name}", "sd1", layer.get_submodule(name))
            for name in ("to_q", "to_k", "to_v")
        )
        for factor in factors:
            torch.nn.init.normal_(factor)
        layer.set_processor(AttnProcessor() if attend is attend_by_products else AttnProcessor2_0())
        if is_ours:
            attend(model)
            use_fast_lora([layer.to_q, layer.to_k, layer.to_v], ADAPTER, Flat([factors]).lowered)
        mask = torch.tensor([[[0.0, -9.0, 0.0]]]).expand(2, 3, 3) if what == "a mask" else None
        torch.manual_seed(1)
        x = torch.randn(2, 3, 8)
        found.append(layer(x, attention_mask=mask))
    torch.testing.assert_close(found[1], found[0])


def test_a_compiler_sees_one_graph_of_a_block_that_gives_the_same():
    torch.manual_seed(0)
    model: Any = torch.nn.ModuleDict({"block": BasicTransformerBlock(8, 2, 4, cross_attention_dim=6)})
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), model, ADAPTER)
    factors = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for factor in factors:
        torch.nn.init.normal_(factor, std=0.3)
    attend_by_products(model)
    use_fast_lora([one for one in model.modules() if is_plain(one)], ADAPTER, Flat([factors]).lowered)
    x, text = torch.randn(2, 5, 8), torch.randn(2, 7, 6)
    right = model.block(x, encoder_hidden_states=text)
    compiled: Any = torch.compile(model.block, backend="eager", fullgraph=True)
    try:
        torch.testing.assert_close(compiled(x, encoder_hidden_states=text), right, rtol=1e-4, atol=1e-5)
    finally:
        torch.compiler.reset()
