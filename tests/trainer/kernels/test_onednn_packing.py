"""Convolutions with packed weights against torch's own."""

import copy

import pytest
import torch

from scumble.trainer.kernels import onednn_packing
from scumble.trainer.kernels.cpu_tape import Recorder
from scumble.trainer.kernels.onednn_packing import is_available, pack_convolutions

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def convolution(side: int = 3, pad: int = 1, bias: bool = True) -> torch.nn.Conv2d:
    torch.manual_seed(0)
    return torch.nn.Conv2d(48, 32, side, padding=pad, bias=bias).requires_grad_(False)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the weights that were packed, in order."""
    shapes: list[torch.Size] = []
    own = onednn_packing.packed

    def counted(weight: torch.Tensor, pad: list[int], shape: torch.Size) -> torch.Tensor:
        shapes.append(weight.shape)
        return own(weight, pad, shape)

    is_available()  # packs a weight in the first call
    monkeypatch.setattr(onednn_packing, "packed", counted)
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("side", "pad"), [(3, 1), (1, 0), (3, 0), (5, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_torch(
    dtype: torch.dtype, side: int, pad: int, bias: bool, packed: list[torch.Size], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(onednn_packing, "MIN_WEIGHTS_PER_INPUT", 0)
    theirs = convolution(side, pad, bias).to(dtype)
    ours = copy.deepcopy(theirs)
    assert pack_convolutions(torch.nn.Sequential(ours)) == 1
    for height, batch in ((6, 2), (9, 1)):  # the packed weight is correct for other shapes too
        x = torch.randn(batch, 48, height, 7, dtype=dtype, requires_grad=True)
        y = x.detach().clone().requires_grad_(True)
        expected, found = theirs(x), ours(y)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert found.is_contiguous()
        gradient = torch.randn_like(expected)
        expected.backward(gradient)
        found.backward(gradient)
        torch.testing.assert_close(y.grad, x.grad, rtol=tolerance, atol=tolerance)
    assert len(packed) == 2  # once for each direction


def test_a_tape_uses_the_packed_weights_and_does_not_pack_them_in_each_replay():
    layer = convolution()
    pack_convolutions(torch.nn.Sequential(layer))
    x = torch.randn(1, 48, 4, 4, requires_grad=True)
    x.grad = torch.zeros_like(x)
    with Recorder() as recorder:  # the first use of the layer, which packs its weight
        loss = layer(x).square().sum()
        loss.backward()
    operators = [str(node.target) for node in recorder.graph.nodes]
    assert sum("_convolution_pointwise" in name for name in operators) == 2
    assert not [name for name in operators if "mkldnn_reorder" in name or "to_mkldnn" in name or "flip" in name]
    expected = x.grad.clone()
    replay = recorder.tape(loss.detach())
    x.grad.zero_()
    assert torch.equal(replay(), loss) and torch.equal(x.grad, expected)


def test_torch_computes_without_gradients_and_where_inputs_are_large(packed: list[torch.Size]):
    layer = convolution()
    pack_convolutions(torch.nn.Sequential(layer))
    with torch.no_grad():
        layer(torch.randn(1, 48, 4, 4))
    num_weights = layer.weight.numel()
    layer(torch.randn(1, 48, num_weights // 48, 1, requires_grad=True))  # as many numbers as the weight has
    assert not packed
    layer(torch.randn(1, 48, 4, 4, requires_grad=True))
    assert len(packed) == 1


@pytest.mark.parametrize(("stride", "dilation", "groups"), [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_only_plain_convolutions_are_packed(stride: int, dilation: int, groups: int):
    layer = torch.nn.Conv2d(4, 4, 3, stride, 1, dilation, groups).requires_grad_(False)
    assert pack_convolutions(torch.nn.Sequential(layer)) == 0


def test_a_trained_convolution_is_not_packed():
    assert pack_convolutions(torch.nn.Sequential(convolution().requires_grad_(True))) == 0


def test_packed_weights_take_no_more_memory_than_allowed(monkeypatch: pytest.MonkeyPatch):
    layer = convolution()
    monkeypatch.setattr(onednn_packing, "MAX_EXTRA_BYTES", 2 * layer.weight.nbytes - 1)
    assert pack_convolutions(torch.nn.Sequential(layer)) == 0
    monkeypatch.setattr(onednn_packing, "MAX_EXTRA_BYTES", 2 * layer.weight.nbytes)
    assert pack_convolutions(torch.nn.Sequential(layer)) == 1


def test_without_the_operators_nothing_is_packed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onednn_packing, "packed", lambda *args: torch.ops.mkldnn.no_such_operator(*args))
    is_available.cache_clear()
    try:
        assert pack_convolutions(torch.nn.Sequential(convolution())) == 0
    finally:
        is_available.cache_clear()
