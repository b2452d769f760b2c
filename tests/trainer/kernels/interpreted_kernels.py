"""Our kernels against torch's in double precision, by Triton's interpreter: for test_fused.py, which sets
TRITON_INTERPRET before Triton is imported."""

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
ULPS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of a number near one, and a little more


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def is_near(found: torch.Tensor | None, wanted: torch.Tensor | None, dtype: torch.dtype) -> None:
    assert found is not None and wanted is not None
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=ULPS[dtype], atol=ULPS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 20, 8, 8), 2), ((1, 60, 20, 30), 3), ((2, 12, 5, 7), 4), ((1, 8, 1, 1), 2)]
)
def test_group_norm_and_its_gradient_are_torchs(
    shape: tuple[int, ...], groups: int, shifted: bool, silu: bool, dtype: torch.dtype
):
    """Groups of fewer and of more channels than are read at once, pixels of less and of more than a chunk."""
    norm_is_torchs(shape, groups, shifted, silu, dtype)


def test_so_are_those_of_more_chunks_than_are_joined_at_once():
    norm_is_torchs((1, 4, 129, 128), 2, True, True, torch.float32)


def norm_is_torchs(shape: tuple[int, ...], groups: int, shifted: bool, silu: bool, dtype: torch.dtype) -> None:
    norm = torch.nn.GroupNorm(groups, shape[1], eps=1e-5).requires_grad_(False)
    norm.weight.copy_(random(shape[1], seed=1) + 1)
    norm.bias.copy_(random(shape[1], seed=2))
    norm.to(dtype)
    x = (2 * random(*shape, seed=3) + 5).to(dtype).requires_grad_(True)
    shift = random(*shape[:2], seed=4, dtype=dtype) if shifted else None
    gradient = random(*shape, seed=5, dtype=dtype)
    exact = x.detach().double().requires_grad_(True)
    given = exact if shift is None else exact + shift.double()[:, :, None, None]
    wanted = F.group_norm(given, groups, norm.weight.double(), norm.bias.double(), norm.eps)
    wanted = F.silu(wanted) if silu else wanted
    found = fused_norms.normalized(norm, x, shift, silu)
    is_near(found, wanted.detach(), dtype)
    found.backward(gradient)
    wanted.backward(gradient.double())
    is_near(x.grad, exact.grad, dtype)


def test_a_mean_that_is_large_beside_the_deviation_costs_no_digits():
    norm = torch.nn.GroupNorm(1, 20, affine=True).requires_grad_(False)
    x = 1000 + random(1, 20, 40, 40, seed=0)
    wanted = F.group_norm(x.double(), 1, eps=norm.eps)
    torch.testing.assert_close(fused_norms.normalized(norm, x).double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 1024, 1300])
def test_gates_and_their_gradients_are_diffusers(width: int, dtype: torch.dtype):
    layer: Any = GEGLU(6, width).requires_grad_(False).to(dtype)
    layer.proj = torch.nn.Identity()
    joint = (3 * random(2, 3, 2 * width, seed=0)).to(dtype).requires_grad_(True)
    exact = joint.detach().double().requires_grad_(True)
    gradient = random(2, 3, width, seed=1, dtype=dtype)
    found, wanted = fused_norms._geglu(layer, joint), layer(exact)
    is_near(found, wanted.detach(), dtype)
    found.backward(gradient)
    wanted.backward(gradient.double())
    is_near(joint.grad, exact.grad, dtype)


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


@pytest.mark.parametrize(("adapted", "recomputed"), [("q", True), ("convolutions", False), ("time", False)])
def test_a_unet_and_its_gradients_are_diffusers(adapted: str, recomputed: bool):
    targets = {"q": r".*\.to_q", "convolutions": r".*resnets.*conv1", "time": r".*time_emb_proj"}[adapted]
    found = []
    for is_ours in (False, True):
        model = unet()
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), model, "it")
        factors = [one for name, one in model.named_parameters() if "lora_" in name]
        torch.manual_seed(1)
        for factor in factors:
            torch.nn.init.normal_(factor, std=0.2).requires_grad_(True)
        if is_ours:
            assert fused_norms.fuse(model) == ""
        if recomputed:
            model.train().enable_gradient_checkpointing(
                lambda module, *given: checkpoint(module, *given, use_reentrant=False)
            )
        x, text = random(2, 4, 8, 8, seed=2).requires_grad_(True), random(2, 7, 24, seed=3)
        out = model(x, torch.tensor([3, 700]), text).sample
        out.square().sum().backward()
        found.append([out.detach(), x.grad, *(factor.grad for factor in factors)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("more", [{"up": True}, {"time_embedding_norm": "scale_shift"}, {"output_scale_factor": 2.0}])
def test_a_block_that_does_more_than_sds_is_left_to_diffusers(more: dict[str, Any]):
    block = ResnetBlock2D(in_channels=32, temb_channels=8, groups=4, **more).requires_grad_(False)
    holder: Any = torch.nn.ModuleList([block])
    holder.device, holder.dtype = CPU, torch.float32
    x, temb = random(1, 32, 4, 4, seed=0), random(1, 8, seed=1)
    wanted = block(x, temb)
    forward = block.forward
    assert fused_norms.fuse(holder) == "" and block.forward == forward
    torch.testing.assert_close(block(x, temb), wanted, rtol=1e-4, atol=1e-4)


def test_norms_that_learn_are_left_to_torch():
    norm = torch.nn.GroupNorm(2, 8)
    found = fused_norms.normalized(norm, random(1, 8, 4, 4, seed=0), random(1, 8, seed=1), silu=True)
    found.sum().backward()
    assert norm.weight.grad is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_trial_finds_kernels_right(dtype: torch.dtype):
    assert fused_norms._is_right(CPU, dtype)


@pytest.mark.parametrize("kernel", ["group_norm_backward", "geglu", "geglu_backward"])
def test_the_trial_finds_kernels_wrong(kernel: str, monkeypatch: pytest.MonkeyPatch):
    kernels = fused_norms._kernels()
    right = getattr(kernels, kernel)
    monkeypatch.setattr(kernels, kernel, lambda *given: 1.5 * right(*given))
    assert fused_norms.why_not.__wrapped__(CPU, torch.float32) == "they give other numbers than torch's"


@pytest.mark.parametrize("what", ["shift", "silu"])
def test_the_trial_finds_a_variant_wrong(what: str, monkeypatch: pytest.MonkeyPatch):
    kernels = fused_norms._kernels()
    right = kernels.group_norm

    def wrong(x: Any, shift: Any, groups: int, weight: Any, bias: Any, eps: float, silu: bool) -> Any:
        return right(x, None if what == "shift" else shift, groups, weight, bias, eps, silu or what == "silu")

    monkeypatch.setattr(kernels, "group_norm", wrong)
    assert not fused_norms._is_right(CPU, torch.float32)
