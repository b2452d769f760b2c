"""A pass can be captured as a CUDA graph, proved without a GPU: it never waits for the device or copies to it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_parts import recorded
from tiny import tiny_base
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scumble.configs.options import Data, Model, Network, Objective
from scumble.datasets.reading.folder import Example
from scumble.datasets.reading.images import Crop, Size
from scumble.trainer.adapters.targets import Part
from scumble.trainer.base_model.detect import detect_base
from scumble.trainer.base_model.latents import Latents
from scumble.trainer.base_model.load import load
from scumble.trainer.kernels.lora_matmul import use_fast_lora
from scumble.trainer.training.checkpointing import enable_gradient_checkpointing
from scumble.trainer.training.flat_parameters import FlatParameters
from scumble.trainer.training.forward_backward import Passes
from scumble.trainer.training.lora import ADAPTER, attach
from scumble.trainer.training.objective import Objectives, Sample
from scumble.trainer.training.optimizers import param_groups

META = torch.device("meta")
OBJECTIVES = {
    "plain": Objective(loss_weighting="none"),
    "min_snr": Objective(noise_offset=0.05, multires_noise_discount=0.3, input_perturbation=0.1),
    "huber": Objective(loss_type="huber", loss_weighting="debiased"),
}


class OnDeviceOnly(TorchDispatchMode):
    """Fails on operators that copy between CPU and device; CPU scalars as arguments are allowed.

    The meta device stands in for CUDA: its tensors have no values, so reading one fails as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        outputs = func(*args, **(kwargs or {}))
        devices = {one.device.type for one in (*inputs, *tree_leaves(outputs)) if isinstance(one, torch.Tensor)}
        scalars = all(one.dim() == 0 for one in inputs if one.device.type == "cpu") and "copy" not in func.name()
        assert devices != {"cpu", "meta"} or scalars, f"{func} copies between CPU and device"
        return outputs


@pytest.mark.parametrize(
    ("kind", "objective", "text_is_trained", "is_checkpointed"),
    [
        ("sd1", "min_snr", True, False),
        ("sd1", "huber", False, True),
        ("sd2-v", "min_snr", False, True),
        ("sd2-v", "huber", True, False),
        ("sdxl", "plain", False, False),
        ("sdxl", "min_snr", True, True),
    ],
)
def test_a_pass_stays_on_the_device(
    kind: str, objective: str, text_is_trained: bool, is_checkpointed: bool, tmp_path: Path
):
    model = Model(base=str(tiny_base(kind, tmp_path)))
    base = load(model, detect_base(model), torch.device("cpu"), torch.bfloat16)
    parts = [Part("unet", 4, 4.0, 2, 2.0)]
    if text_is_trained:
        parts += [Part(name, 2, 2.0) for name in ["text", "text2"][: len(base.text_encoders)]]
    layers = attach(base, Network(targets="full"), parts, seed=0)
    for module in (base.unet, *base.text_encoders):
        module.to(META).train()
    base.device = META
    groups = param_groups([(1e-3, [parameter for layer in layers for parameter in layer.tensors.values()])])
    flat = FlatParameters([group["params"] for group in groups], torch.bfloat16)
    assert use_fast_lora([layer.layer for layer in layers], ADAPTER, flat.lowered)
    if is_checkpointed:
        enable_gradient_checkpointing(base, parts)
    size = Size(64, 64)
    latents = Latents(*([[torch.zeros(4, 16, 16, device=META)]] * 2 for _ in range(2)), 0.18)
    objectives = Objectives(
        base, [Example(Path(f"{index}.png"), "a cat", 1) for index in range(2)], [[Crop(size, size, 0, 0, size)]] * 2,
        latents, Data(caption_dropout=0.0), OBJECTIVES[objective], 0, text_is_trained,
        [(torch.ones(16, 16),), (torch.ones(16, 16),)],
    )  # fmt: skip
    on_device: list[bool] = []

    def capture(run: Any) -> Any:
        with OnDeviceOnly() as mode:
            on_device.append(run().device == META)
        assert any("backward" in name for name in mode.names)
        return recorded(run)

    Passes(objectives, flat, capture=capture, report=pytest.fail)([Sample(0, 0, 0), Sample(1, 0, 1)], 2.0)
    assert on_device == [True]
