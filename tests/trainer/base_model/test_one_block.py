"""Frozen weights in one block: values stay, convolutions become channels-last, and trained weights do not move."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_base

from scumble.configs.options import Model, Network
from scumble.trainer.adapters.targets import Part
from scumble.trainer.base_model import one_block
from scumble.trainer.base_model.detect import detect_base
from scumble.trainer.base_model.load import load
from scumble.trainer.base_model.one_block import ALIGNED_BYTES, place_separately, place_together
from scumble.trainer.training.lora import attach


@pytest.fixture
def other_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A simulated device with CPU memory."""
    monkeypatch.setattr(one_block, "_block", lambda size, device: torch.empty(size, dtype=torch.uint8))
    return torch.device("meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unet_in_one_block_computes_the_same(dtype: torch.dtype, tmp_path: Path, other_device: torch.device):
    model = Model(base=str(tiny_base("sd1", tmp_path)))
    base = load(model, detect_base(model), torch.device("cpu"), dtype)
    unet = base.unet
    trained = attach(base, Network(), [Part("unet", 4, 4.0)], seed=0)
    adapter = [parameter for one in trained for parameter in one.tensors.values()]
    before = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in unet.named_buffers()}
    pointers = [parameter.data_ptr() for parameter in adapter]
    hidden = torch.randn(2, 7, unet.config["cross_attention_dim"], dtype=dtype)
    inputs = torch.randn(2, 4, 16, 16, dtype=dtype), torch.tensor([3, 7]), hidden
    expected = unet(*inputs).sample
    place_together(unet, other_device)
    frozen = [parameter for parameter in unet.parameters() if not parameter.requires_grad]
    assert len({parameter.untyped_storage().data_ptr() for parameter in frozen}) == 1
    assert all(one.storage_offset() * one.element_size() % ALIGNED_BYTES == 0 for one in frozen)
    for name, parameter in unet.named_parameters():
        assert torch.equal(parameter, before[name]), name
        if not parameter.requires_grad and parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last), name
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in unet.named_buffers())
    assert [parameter.data_ptr() for parameter in adapter] == pointers
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5  # channels-last sums in another order
    torch.testing.assert_close(unet(*inputs).sample, expected, rtol=tolerance, atol=tolerance)
    assert unet.to(memory_format=torch.channels_last).conv_in.weight.data_ptr() == unet.conv_in.weight.data_ptr()


def test_weights_already_on_the_device_do_not_move(other_device: torch.device):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).requires_grad_(False)
    pointers = [tensor.data_ptr() for tensor in module.state_dict().values()]
    place_together(module, torch.device("cpu"))
    place_separately(module, torch.device("cpu"))
    assert [tensor.data_ptr() for tensor in module.state_dict().values()] == pointers


def test_shared_weights_stay_shared(other_device: torch.device):
    one, other = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
    other.weight = one.weight
    module = torch.nn.ModuleList([one, other]).requires_grad_(False)
    place_together(module, other_device)
    assert one.weight is other.weight
