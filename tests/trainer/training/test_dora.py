"""DoRA by inputs: nothing changes at the start; values and gradients are those of the formula written out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from small_parts import loaded, painted, parts_of
from torch.nn.functional import conv2d, linear

from scumble.configs.options import Network
from scumble.trainer.adapters.targets import Part
from scumble.trainer.training.checkpointing import recompute_activations
from scumble.trainer.training.export import network_arguments, tensors_of
from scumble.trainer.training.lora import ADAPTER, AdaptedLayer, attach, component_of

Plain = torch.nn.Linear | torch.nn.Conv2d


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[AdaptedLayer]:
    """A Linear and convolutions of 1 x 1 and 3 x 3 (one with stride), their factors and magnitudes shaken."""
    base = loaded("sd1", tmp_path_factory.mktemp("sd1"))
    targets = r"down_blocks\.0\.(attentions\.0\.(proj_in|transformer_blocks\.0\.attn2\.to_k)|downsamplers\.0\.conv)"
    adapted = attach(base, Network(algorithm="dora", targets=targets), [Part("unet", 4, 8.0)], seed=0)
    generator = torch.Generator().manual_seed(1)
    for module in adapted:
        up, magnitude = module.tensors["lora_up"], module.tensors["dora_scale"]
        up.data = 0.3 * torch.randn(up.shape, generator=generator)
        magnitude.data *= 1 + 0.2 * torch.randn(magnitude.shape, generator=generator)
    return adapted


def dense(module: AdaptedLayer, inputs: torch.Tensor) -> torch.Tensor:
    """The layer with W' = m · V / ‖V‖, V = W + s · up @ down, written out; the norm is a constant (section 4.3)."""
    layer = plain(module)
    up, down, magnitude = (module.tensors[slot] for slot in ("lora_up", "lora_down", "dora_scale"))
    changed = layer.weight + 2.0 * (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
    norm = changed.detach().pow(2).sum((0, 2, 3) if changed.dim() == 4 else 0, keepdim=True).sqrt()
    weight = magnitude * changed / norm
    if isinstance(layer, torch.nn.Conv2d):
        return conv2d(inputs, weight, layer.bias, layer.stride, layer.padding)
    return linear(inputs, weight, layer.bias)


def plain(module: AdaptedLayer) -> Plain:
    layer = module.layer.get_base_layer()
    assert isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    return layer


def live(module: AdaptedLayer) -> torch.nn.Module:
    assert isinstance(module.layer, torch.nn.Module)
    return module.layer


def inputs_for(module: AdaptedLayer) -> torch.Tensor:
    width = plain(module).weight.shape[1]
    shape = (2, width, 8, 8) if isinstance(plain(module), torch.nn.Conv2d) else (2, 7, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_at_the_start_nothing_changes_not_even_a_bit(kind: str, tmp_path: Path):
    base = loaded(kind, tmp_path)
    before = painted(base)
    trained = attach(base, Network(algorithm="dora", targets="full"), parts_of(base, 3), seed=0)
    np.testing.assert_array_equal(painted(base), before)
    for module in trained:
        weight = plain(module).weight
        magnitude = module.tensors["dora_scale"]
        assert magnitude.shape == (1, weight.shape[1], *[1] * (weight.dim() - 2)) and magnitude.requires_grad
        assert {parameter.dtype for parameter in module.tensors.values()} == {torch.float32}


def test_values_and_gradients_are_those_of_the_formula(trained: list[AdaptedLayer]):
    assert {type(plain(module)) for module in trained} == {torch.nn.Linear, torch.nn.Conv2d}
    for module in trained:
        found = []
        for forward in (live(module), lambda x, module=module: dense(module, x)):
            inputs = inputs_for(module).requires_grad_(True)
            outputs = forward(inputs)
            outputs.pow(2).sum().backward()
            parameters = module.tensors.values()
            found.append([outputs.detach(), inputs.grad, *(parameter.grad for parameter in parameters)])
            for parameter in parameters:
                parameter.grad = None
        for ours, theirs in zip(*found, strict=True):
            assert ours is not None and theirs is not None and theirs.abs().max() > 0
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_autocast_stays_near_the_formula_and_takes_the_norm_in_full_precision(trained: list[AdaptedLayer]):
    for module in trained:
        inputs = inputs_for(module)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = live(module)(inputs.bfloat16())
        outputs.float().pow(2).sum().backward()
        expected = dense(module, inputs).detach()
        assert outputs.dtype == torch.bfloat16
        torch.testing.assert_close(outputs.float(), expected, rtol=0, atol=0.03 * float(expected.abs().max()))
        for parameter in module.tensors.values():
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all()
            parameter.grad = None


def test_dropout_is_that_of_pefts_lora_and_switching_off_takes_the_magnitudes_off(trained: list[AdaptedLayer]):
    for module in trained:
        layer, inputs = live(module), inputs_for(module)
        assert isinstance(layer, LoraLayer)
        layer.lora_dropout[ADAPTER] = torch.nn.Dropout(0.5)
        layer.train()
        torch.manual_seed(0)
        one = layer(inputs)
        torch.manual_seed(0)
        assert torch.equal(one, layer(inputs)) and not torch.equal(one, layer(inputs))
        layer.eval()
        torch.testing.assert_close(layer(inputs), dense(module, inputs), rtol=1e-4, atol=1e-4)
        layer.enable_adapters(False)
        torch.testing.assert_close(layer(inputs), plain(module)(inputs), rtol=0, atol=0)
        layer.enable_adapters(True)


def test_recomputed_activations_give_the_same_gradients(tmp_path: Path):
    parts = [Part("unet", 2, 2.0), Part("text", 2, 2.0)]
    found = []
    for recomputed in (False, True):
        base = loaded("sd1", tmp_path / str(recomputed))
        trained = attach(base, Network(algorithm="dora"), parts, seed=0)
        for part in parts:
            component_of(base, part.name).train()
        if recomputed:
            recompute_activations(base, parts)
        hidden = base.text_encoders[0](torch.arange(77)[None])[0]
        latents = torch.ones(1, 4, 16, 16)
        base.unet(latents, torch.tensor([500]), hidden).sample.pow(2).mean().backward()
        gradients = [module.tensors["dora_scale"].grad for module in trained]
        found.append([gradient for gradient in gradients if gradient is not None])
        assert len(found[-1]) == len(trained)
    assert any(gradient.abs().max() > 0 for gradient in found[0])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_the_file_keeps_magnitudes_in_full_precision_and_its_metadata_tells_of_them(trained: list[AdaptedLayer]):
    tensors = tensors_of(trained, torch.float16)
    for module in trained:
        assert torch.equal(tensors[f"{module.key}.dora_scale"], module.tensors["dora_scale"])
        assert tensors[f"{module.key}.lora_up.weight"].dtype == torch.float16
    assert network_arguments(Network(algorithm="dora"), Part("unet", 4, 4.0)) == {"dora_wd": True}
