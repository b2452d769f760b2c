"""The fused kernels in Triton's interpreter, compared with torch in double precision.

test_fused_norms.py runs this file in a process with TRITON_INTERPRET set before Triton is imported.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.checkpoint import checkpoint

from scumble.trainer.kernels import fused_norms

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # slightly above the epsilon


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found: torch.Tensor | None, expected: torch.Tensor | None, dtype: torch.dtype) -> None:
    assert found is not None and expected is not None
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 20, 8, 8), 2), ((1, 60, 20, 30), 3), ((2, 12, 5, 7), 4), ((1, 8, 1, 1), 2)]
)
def test_group_norm_and_its_gradient_match_torch(
    shape: tuple[int, ...], groups: int, shifted: bool, silu: bool, dtype: torch.dtype
):
    """Groups have fewer or more channels than a tile, and images fewer or more pixels than a chunk."""
    compare_group_norm(shape, groups, shifted, silu, dtype)


def test_group_norm_matches_torch_with_more_chunks_than_are_combined_at_once():
    compare_group_norm((1, 4, 129, 128), 2, True, True, torch.float32)


def compare_group_norm(shape: tuple[int, ...], groups: int, shifted: bool, silu: bool, dtype: torch.dtype) -> None:
    norm = torch.nn.GroupNorm(groups, shape[1], eps=1e-5).requires_grad_(False)
    norm.weight.copy_(random(shape[1], seed=1) + 1)
    norm.bias.copy_(random(shape[1], seed=2))
    norm.to(dtype)
    x = (2 * random(*shape, seed=3) + 5).to(dtype).requires_grad_(True)
    shift = random(*shape[:2], seed=4, dtype=dtype) if shifted else None
    gradient = random(*shape, seed=5, dtype=dtype)
    exact = x.detach().double().requires_grad_(True)
    shifted_x = exact if shift is None else exact + shift.double()[:, :, None, None]
    expected = F.group_norm(shifted_x, groups, norm.weight.double(), norm.bias.double(), norm.eps)
    expected = F.silu(expected) if silu else expected
    found = fused_norms.group_norm(norm, x, shift, silu)
    assert_near(found, expected.detach(), dtype)
    found.backward(gradient)
    expected.backward(gradient.double())
    assert_near(x.grad, exact.grad, dtype)


def test_a_mean_much_larger_than_the_deviation_does_not_reduce_precision():
    norm = torch.nn.GroupNorm(1, 20, affine=True).requires_grad_(False)
    x = 1000 + random(1, 20, 40, 40, seed=0)
    expected = F.group_norm(x.double(), 1, eps=norm.eps)
    torch.testing.assert_close(fused_norms.group_norm(norm, x).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 1024, 1300])
def test_geglu_and_its_gradient_match_diffusers(width: int, dtype: torch.dtype):
    layer: Any = GEGLU(6, width).requires_grad_(False).to(dtype)
    layer.proj = torch.nn.Identity()
    joint = (3 * random(2, 3, 2 * width, seed=0)).to(dtype).requires_grad_(True)
    exact = joint.detach().double().requires_grad_(True)
    gradient = random(2, 3, width, seed=1, dtype=dtype)
    found, expected = fused_norms._geglu(layer, joint), layer(exact)
    assert_near(found, expected.detach(), dtype)
    found.backward(gradient)
    expected.backward(gradient.double())
    assert_near(joint.grad, exact.grad, dtype)


def unet() -> Any:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=24,
        attention_head_dim=4, norm_num_groups=4,
    ).requires_grad_(False)  # fmt: skip
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return model


@pytest.mark.parametrize(("adapted", "checkpointing"), [("q", True), ("convolutions", False), ("time", False)])
def test_the_outputs_and_gradients_of_a_unet_match_diffusers(adapted: str, checkpointing: bool):
    targets = {"q": r".*\.to_q", "convolutions": r".*resnets.*conv1", "time": r".*time_emb_proj"}[adapted]
    results = []
    for is_ours in (False, True):
        model = unet()
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), model, "default")
        factors = [one for name, one in model.named_parameters() if "lora_" in name]
        torch.manual_seed(1)
        for factor in factors:
            torch.nn.init.normal_(factor, std=0.2).requires_grad_(True)
        if is_ours:
            assert fused_norms.fuse(model) == ""
        if checkpointing:
            model.train().enable_gradient_checkpointing(
                lambda module, *args: checkpoint(module, *args, use_reentrant=False)
            )
        x, text = random(2, 4, 8, 8, seed=2).requires_grad_(True), random(2, 7, 24, seed=3)
        out = model(x, torch.tensor([3, 700]), text).sample
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(factor.grad for factor in factors)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("option", [{"up": True}, {"time_embedding_norm": "scale_shift"}, {"output_scale_factor": 2.0}])
def test_a_block_with_features_that_sd_does_not_use_is_left_to_diffusers(option: dict[str, Any]):
    block = ResnetBlock2D(in_channels=32, temb_channels=8, groups=4, **option).requires_grad_(False)
    holder: Any = torch.nn.ModuleList([block])
    holder.device, holder.dtype = CPU, torch.float32
    x, temb = random(1, 32, 4, 4, seed=0), random(1, 8, seed=1)
    expected = block(x, temb)
    forward = block.forward
    assert fused_norms.fuse(holder) == "" and block.forward == forward
    torch.testing.assert_close(block(x, temb), expected, rtol=1e-4, atol=1e-4)


def test_trained_norms_are_left_to_torch():
    norm = torch.nn.GroupNorm(2, 8)
    found = fused_norms.group_norm(norm, random(1, 8, 4, 4, seed=0), random(1, 8, seed=1), silu=True)
    found.sum().backward()
    assert norm.weight.grad is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_check_accepts_correct_kernels(dtype: torch.dtype):
    assert fused_norms._matches_torch(CPU, dtype)


@pytest.mark.parametrize("kernel", ["group_norm_backward", "geglu", "geglu_backward"])
def test_the_check_rejects_wrong_kernels(kernel: str, monkeypatch: pytest.MonkeyPatch):
    kernels = fused_norms._kernels()
    correct = getattr(kernels, kernel)
    monkeypatch.setattr(kernels, kernel, lambda *args: 1.5 * correct(*args))
    assert fused_norms.why_not.__wrapped__(CPU, torch.float32) == "their results differ from torch's"


@pytest.mark.parametrize("variant", ["shift", "silu"])
def test_the_check_rejects_a_wrong_variant(variant: str, monkeypatch: pytest.MonkeyPatch):
    kernels = fused_norms._kernels()
    correct = kernels.group_norm

    def wrong(x: Any, shift: Any, groups: int, weight: Any, bias: Any, eps: float, silu: bool) -> Any:
        return correct(x, None if variant == "shift" else shift, groups, weight, bias, eps, silu or variant == "silu")

    monkeypatch.setattr(kernels, "group_norm", wrong)
    assert not fused_norms._matches_torch(CPU, torch.float32)
