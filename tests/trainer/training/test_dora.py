"""DoRA with magnitudes per input: it starts as the identity, and values and gradients match the formula."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from small_parts import loaded, parts_of, rendered
from torch.nn.functional import conv2d, linear

from scumble.configs.options import Network
from scumble.trainer.adapters.targets import Part
from scumble.trainer.training.checkpointing import enable_gradient_checkpointing
from scumble.trainer.training.export import network_arguments, tensors_of
from scumble.trainer.training.lora import ADAPTER, AdaptedLayer, attach, component_of


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> list[AdaptedLayer]:
    """A Linear and convolutions of 1 x 1 and 3 x 3 (one with stride), with random factors and magnitudes."""
    base = loaded("sd1", tmp_path_factory.mktemp("sd1"))
    targets = r"down_blocks\.0\.(attentions\.0\.(proj_in|transformer_blocks\.0\.attn2\.to_k)|downsamplers\.0\.conv)"
    layers = attach(base, Network(algorithm="dora", targets=targets), [Part("unet", 4, 8.0)], seed=0)
    generator = torch.Generator().manual_seed(1)
    for layer in layers:
        up, magnitude = layer.tensors["lora_up"], layer.tensors["dora_scale"]
        up.data = 0.3 * torch.randn(up.shape, generator=generator)
        magnitude.data *= 1 + 0.2 * torch.randn(magnitude.shape, generator=generator)
    return layers


def reference(layer: AdaptedLayer, inputs: torch.Tensor) -> torch.Tensor:
    """The layer with W' = m · V / ‖V‖, V = W + s · up @ down, as one weight; the norm is a constant (section 4.3)."""
    base = base_of(layer)
    up, down, magnitude = (layer.tensors[slot] for slot in ("lora_up", "lora_down", "dora_scale"))
    changed = base.weight + 2.0 * (up.flatten(1) @ down.flatten(1)).reshape(base.weight.shape)
    norm = changed.detach().pow(2).sum((0, 2, 3) if changed.dim() == 4 else 0, keepdim=True).sqrt()
    weight = magnitude * changed / norm
    if isinstance(base, torch.nn.Conv2d):
        return conv2d(inputs, weight, base.bias, base.stride, base.padding)
    return linear(inputs, weight, base.bias)


def base_of(layer: AdaptedLayer) -> torch.nn.Linear | torch.nn.Conv2d:
    base = layer.layer.get_base_layer()
    assert isinstance(base, torch.nn.Linear | torch.nn.Conv2d)
    return base


def live(layer: AdaptedLayer) -> torch.nn.Module:
    assert isinstance(layer.layer, torch.nn.Module)
    return layer.layer


def inputs_for(layer: AdaptedLayer) -> torch.Tensor:
    width = base_of(layer).weight.shape[1]
    shape = (2, width, 8, 8) if isinstance(base_of(layer), torch.nn.Conv2d) else (2, 7, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_new_adapter_changes_no_bit_of_the_image(kind: str, tmp_path: Path):
    base = loaded(kind, tmp_path)
    before = rendered(base)
    layers = attach(base, Network(algorithm="dora", targets="full"), parts_of(base, 3), seed=0)
    np.testing.assert_array_equal(rendered(base), before)
    for layer in layers:
        weight = base_of(layer).weight
        magnitude = layer.tensors["dora_scale"]
        assert magnitude.shape == (1, weight.shape[1], *[1] * (weight.dim() - 2)) and magnitude.requires_grad
        assert {parameter.dtype for parameter in layer.tensors.values()} == {torch.float32}


def test_values_and_gradients_match_the_formula(layers: list[AdaptedLayer]):
    assert {type(base_of(layer)) for layer in layers} == {torch.nn.Linear, torch.nn.Conv2d}
    for layer in layers:
        found = []
        for forward in (live(layer), lambda x, layer=layer: reference(layer, x)):
            inputs = inputs_for(layer).requires_grad_(True)
            outputs = forward(inputs)
            outputs.pow(2).sum().backward()
            parameters = layer.tensors.values()
            found.append([outputs.detach(), inputs.grad, *(parameter.grad for parameter in parameters)])
            for parameter in parameters:
                parameter.grad = None
        for ours, theirs in zip(*found, strict=True):
            assert ours is not None and theirs is not None and theirs.abs().max() > 0
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_autocast_stays_close_to_the_formula_and_keeps_gradients_in_fp32(layers: list[AdaptedLayer]):
    for layer in layers:
        inputs = inputs_for(layer)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = live(layer)(inputs.bfloat16())
        outputs.float().pow(2).sum().backward()
        expected = reference(layer, inputs).detach()
        assert outputs.dtype == torch.bfloat16
        torch.testing.assert_close(outputs.float(), expected, rtol=0, atol=0.03 * float(expected.abs().max()))
        for parameter in layer.tensors.values():
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all()
            parameter.grad = None


def test_dropout_applies_and_disabling_adapters_disables_the_magnitudes(layers: list[AdaptedLayer]):
    for layer in layers:
        module, inputs = live(layer), inputs_for(layer)
        assert isinstance(module, LoraLayer)
        module.lora_dropout[ADAPTER] = torch.nn.Dropout(0.5)
        module.train()
        torch.manual_seed(0)
        first = module(inputs)
        torch.manual_seed(0)
        assert torch.equal(first, module(inputs)) and not torch.equal(first, module(inputs))
        module.eval()
        torch.testing.assert_close(module(inputs), reference(layer, inputs), rtol=1e-4, atol=1e-4)
        module.enable_adapters(False)
        torch.testing.assert_close(module(inputs), base_of(layer)(inputs), rtol=0, atol=0)
        module.enable_adapters(True)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path):
    parts = [Part("unet", 2, 2.0), Part("text", 2, 2.0)]
    found = []
    for is_checkpointed in (False, True):
        base = loaded("sd1", tmp_path / str(is_checkpointed))
        layers = attach(base, Network(algorithm="dora"), parts, seed=0)
        for part in parts:
            component_of(base, part.name).train()
        if is_checkpointed:
            enable_gradient_checkpointing(base, parts)
        hidden = base.text_encoders[0](torch.arange(77)[None])[0]
        latents = torch.ones(1, 4, 16, 16)
        base.unet(latents, torch.tensor([500]), hidden).sample.pow(2).mean().backward()
        gradients = [layer.tensors["dora_scale"].grad for layer in layers]
        found.append([gradient for gradient in gradients if gradient is not None])
        assert len(found[-1]) == len(layers)
    assert any(gradient.abs().max() > 0 for gradient in found[0])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_the_file_stores_magnitudes_in_fp32_and_its_metadata_mentions_dora(layers: list[AdaptedLayer]):
    tensors = tensors_of(layers, torch.float16)
    for layer in layers:
        assert torch.equal(tensors[f"{layer.key}.dora_scale"], layer.tensors["dora_scale"])
        assert tensors[f"{layer.key}.lora_up.weight"].dtype == torch.float16
    assert network_arguments(Network(algorithm="dora"), Part("unet", 4, 4.0)) == {"dora_wd": True}
