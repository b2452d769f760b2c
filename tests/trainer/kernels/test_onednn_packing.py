"""Convolutions whose weights are laid out once, against torch's own."""

import copy

import pytest
import torch

from scumble.trainer.kernels import onednn_packing
from scumble.trainer.kernels.onednn_packing import pack_convolutions

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def convolution(side: int = 3, pad: int = 1, bias: bool = True) -> torch.nn.Conv2d:
    torch.manual_seed(0)
    return torch.nn.Conv2d(48, 32, side, padding=pad, bias=bias).requires_grad_(False)


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what was laid out, in order."""
    shapes: list[torch.Size] = []
    own = onednn_packing.laid_out

    def counted(weight: torch.Tensor, pad: list[int], shape: torch.Size) -> torch.Tensor:
        shapes.append(weight.shape)
        return own(weight, pad, shape)

    onednn_packing.is_there()  # which lays something out the first time
    monkeypatch.setattr(onednn_packing, "laid_out", counted)
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("side", "pad"), [(3, 1), (1, 0), (3, 0), (5, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_torchs(
    dtype: torch.dtype, side: int, pad: int, bias: bool, laid_out: list[torch.Size], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(onednn_packing, "WEIGHTS_PER_INPUT", 0)
    theirs = convolution(side, pad, bias).to(dtype)
    ours = copy.deepcopy(theirs)
    assert pack_convolutions(torch.nn.Sequential(ours)) == 1
    for height, batch in ((6, 2), (9, 1)):  # the copy is good for other shapes too
        x = torch.randn(batch, 48, height, 7, dtype=dtype, requires_grad=True)
        y = x.detach().clone().requires_grad_(True)
        wanted, found = theirs(x), ours(y)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        assert found.is_contiguous()
        gradient = torch.randn_like(wanted)
        wanted.backward(gradient)
        found.backward(gradient)
        torch.testing.assert_close(y.grad, x.grad, rtol=tolerance, atol=tolerance)
    assert len(laid_out) == 2  # once for each direction


def test_what_it_does_not_pay_for_is_left_to_torch(laid_out: list[torch.Size]):
    layer = convolution()
    pack_convolutions(torch.nn.Sequential(layer))
    with torch.no_grad():
        layer(torch.randn(1, 48, 4, 4))
    many = layer.weight.numel()  # as many numbers come in as there are weights
    layer(torch.randn(1, 48, many // 48, 1, requires_grad=True))
    assert not laid_out
    layer(torch.randn(1, 48, 4, 4, requires_grad=True))
    assert len(laid_out) == 1


@pytest.mark.parametrize(("stride", "dilation", "groups"), [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_only_plain_convolutions_are_packed(stride: int, dilation: int, groups: int):
    layer = torch.nn.Conv2d(4, 4, 3, stride, 1, dilation, groups).requires_grad_(False)
    assert pack_convolutions(torch.nn.Sequential(layer)) == 0


def test_a_convolution_that_learns_is_not_packed():
    assert pack_convolutions(torch.nn.Sequential(convolution().requires_grad_(True))) == 0


def test_no_more_memory_is_taken_than_is_allowed(monkeypatch: pytest.MonkeyPatch):
    layer = convolution()
    monkeypatch.setattr(onednn_packing, "MAX_EXTRA_BYTES", 2 * layer.weight.nbytes - 1)
    assert pack_convolutions(torch.nn.Sequential(layer)) == 0
    monkeypatch.setattr(onednn_packing, "MAX_EXTRA_BYTES", 2 * layer.weight.nbytes)
    assert pack_convolutions(torch.nn.Sequential(layer)) == 1


def test_where_torch_has_no_such_operators_its_own_convolution_computes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onednn_packing, "laid_out", lambda *args: torch.ops.mkldnn.there_is_none(*args))
    onednn_packing.is_there.cache_clear()
    try:
        assert pack_convolutions(torch.nn.Sequential(convolution())) == 0
    finally:
        onednn_packing.is_there.cache_clear()
