"""LoRA products compared with PEFT, flat parameters with separate ones, captured passes with eager ones."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from runs import train_run
from small_parts import recorded

from scumble.trainer import train as recipe
from scumble.trainer.adapters.files import read_tensors
from scumble.trainer.base_model.quantize import QuantizedLinear
from scumble.trainer.kernels import lora_matmul
from scumble.trainer.kernels.capture import Capture, Replay
from scumble.trainer.kernels.lora_matmul import is_plain, joint_linear, use_fast_lora
from scumble.trainer.training.flat_parameters import FlatParameters
from scumble.trainer.training.forward_backward import Passes
from scumble.trainer.training.objective import Batch, Sample
from scumble.trainer.training.optimizers import OPTIMIZERS, make_optimizer, param_groups


class Mixed(torch.nn.Module):
    """A convolution between two linear layers, so that gradients flow through each."""

    def __init__(self, stride: int):
        super().__init__()
        self.first = torch.nn.Linear(6, 8)
        self.conv = torch.nn.Conv2d(8, 10, 3, stride, 1)
        self.last = torch.nn.Linear(10, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.conv(self.first(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def adapted(dropout: float = 0.0, stride: int = 1) -> tuple[torch.nn.Module, list[torch.nn.Parameter]]:
    torch.manual_seed(0)
    model = Mixed(stride).requires_grad_(False)
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=["first", "conv", "last"])
    inject_adapter_in_model(config, model, "default")
    parameters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.3).requires_grad_(True)
    return model, parameters


def layers_of(model: torch.nn.Module) -> list[Any]:
    return [model.get_submodule(name) for name in ("first", "conv", "last")]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("flat_gradients", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_outputs_and_gradients_match_peft(stride: int, flat_gradients: bool, dropout: float):
    theirs, their_parameters = adapted(dropout, stride)
    ours, our_parameters = adapted(dropout, stride)
    flat = FlatParameters([our_parameters])
    if not flat_gradients:
        for parameter in our_parameters:
            parameter.grad = None
    assert use_fast_lora(layers_of(ours), "default", flat.lowered)
    x = torch.randn(2, 5, 5, 6, requires_grad=True)
    y = x.detach().clone().requires_grad_(True)
    for _ in range(2):  # gradients accumulate
        torch.manual_seed(1)
        expected = theirs(x)
        torch.manual_seed(1)
        found = ours(y)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        expected.square().sum().backward()
        found.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-5, atol=1e-5)
    for our, their in zip(our_parameters, their_parameters, strict=True):
        torch.testing.assert_close(our.grad, their.grad, rtol=1e-5, atol=1e-5)
    if flat_gradients:
        assert torch.equal(
            flat.gradients[0], torch.cat([p.grad.flatten() for p in our_parameters if p.grad is not None])
        )


class Qkv(torch.nn.Module):
    """Three layers of the same input."""

    def __init__(self, bias: bool = False, widths: Sequence[int] = (8, 8, 8)):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(6, width, bias=bias) for width in widths)

    @property
    def layers(self) -> list[Any]:
        return [self.q, self.k, self.v]


def qkv(bias: bool = False, widths: Sequence[int] = (8, 8, 8), **config: Any) -> tuple[Qkv, list[torch.nn.Parameter]]:
    """The adapted layers and their factors, every A before every B."""
    torch.manual_seed(0)
    model = Qkv(bias, widths).requires_grad_(False)
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["q", "k", "v"], **config}
    inject_adapter_in_model(LoraConfig(**config), model, "default")
    named = sorted(model.named_parameters(), key=lambda pair: "lora_B" in pair[0])
    parameters = [parameter for name, parameter in named if "lora_" in name]
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.3).requires_grad_(True)
    return model, parameters


@pytest.mark.parametrize("flat_gradients", [False, True])
@pytest.mark.parametrize("input_grad", [False, True])
def test_joint_layers_give_the_outputs_and_gradients_of_peft(flat_gradients: bool, input_grad: bool):
    theirs, their_parameters = qkv()
    ours, our_parameters = qkv()
    flat = FlatParameters([our_parameters])
    if not flat_gradients:
        for parameter in our_parameters:
            parameter.grad = None
    assert use_fast_lora(ours.layers, "default", flat.lowered)
    x = torch.randn(2, 5, 6, requires_grad=input_grad)
    y = x.detach().clone().requires_grad_(input_grad)
    for _ in range(2):  # gradients accumulate
        expected = torch.stack([layer(x) for layer in theirs.layers], -2)
        found = joint_linear(ours.layers, y)
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        expected.pow(3).sum().backward()
        found.pow(3).sum().backward()
    if input_grad:
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-5)
    for our, their in zip(our_parameters, their_parameters, strict=True):
        torch.testing.assert_close(our.grad, their.grad, rtol=1e-4, atol=1e-5)


def test_joint_layers_store_their_weights_once_and_notice_a_replaced_weight():
    model, parameters = qkv()
    use_fast_lora(model.layers, "default", FlatParameters([parameters]).lowered)
    x = torch.randn(2, 6)

    def storages() -> set[int]:
        return {layer.get_base_layer().weight.untyped_storage().data_ptr() for layer in model.layers}

    before = torch.stack([layer(x) for layer in model.layers], -2)
    assert len(storages()) == 3
    found = joint_linear(model.layers, x)
    torch.testing.assert_close(found, before)
    assert len(merged := storages()) == 1
    joint_linear(model.layers, x)
    assert storages() == merged
    base = model.layers[1].get_base_layer()
    for change in (lambda: setattr(base, "weight", torch.nn.Parameter(torch.zeros(8, 6), False)), base.double):
        change()
        base.float().weight.data.add_(1)
        again = joint_linear(model.layers, x)
        torch.testing.assert_close(again, torch.stack([layer(x) for layer in model.layers], -2))


SEPARATE: dict[str, dict[str, Any]] = {
    "bias": {"bias": True},
    "width": {"widths": (8, 8, 4)},
    "dropout": {"lora_dropout": 0.5},
    "no adapter": {"target_modules": ["q", "v"]},
    "rank": {"rank_pattern": {"k": 1}, "alpha_pattern": {"k": 2}},
    "scale": {"alpha_pattern": {"k": 1}},
}


@pytest.mark.parametrize("reason", [*SEPARATE, "quantized", "order", "trained base", "not fast"])
def test_layers_that_must_be_computed_separately_are_not_joined(reason: str):
    model, parameters = qkv(**SEPARATE.get(reason, {}))
    if reason == "order":
        parameters = [factor for pair in zip(parameters[:3], parameters[3:], strict=True) for factor in pair]
    if reason != "not fast":
        use_fast_lora(filter(is_plain, model.layers), "default", FlatParameters([parameters]).lowered)
    _, k, v = model.layers
    if reason == "quantized":
        k.base_layer = QuantizedLinear(k.get_base_layer(), 8, torch.device("cpu"))
    if reason == "trained base":
        v.get_base_layer().weight.requires_grad_(True)
    assert joint_linear(model.layers, torch.randn(2, 6)) is None


def test_joint_layers_release_their_weights_when_a_base_is_quantized():
    model, parameters = qkv()
    use_fast_lora(model.layers, "default", FlatParameters([parameters]).lowered)
    x = torch.randn(2, 6)
    assert joint_linear(model.layers, x) is not None
    weights = [weakref.ref(layer.get_base_layer().weight) for layer in model.layers]
    for layer in model.layers:
        layer.base_layer = QuantizedLinear(layer.get_base_layer(), 8, torch.device("cpu"))
    assert joint_linear(model.layers, x) is None and [one() for one in weights] == [None] * 3


def test_products_without_fp32_accumulation_are_detected_but_too_little_memory_is_raised(
    monkeypatch: pytest.MonkeyPatch,
):
    cpu = torch.device("cpu")  # where torch does not support this product
    assert not lora_matmul._adds_to_fp32.__wrapped__(cpu, torch.bfloat16)
    monkeypatch.setattr(lora_matmul, "_add_product_to_fp32", lambda *args: None)
    assert not lora_matmul._adds_to_fp32.__wrapped__(cpu, torch.bfloat16)  # a product that adds nothing

    def out_of_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(lora_matmul, "_add_product_to_fp32", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        lora_matmul._adds_to_fp32.__wrapped__(cpu, torch.bfloat16)
    monkeypatch.setattr(
        lora_matmul, "_add_product_to_fp32", lambda total, left, right, scale: total.add_(left @ right * 2)
    )
    assert lora_matmul._adds_to_fp32.__wrapped__(cpu, torch.bfloat16)


def test_no_gradients_are_computed_for_tensors_that_do_not_require_them():
    model, parameters = adapted()
    flat = FlatParameters([parameters])
    use_fast_lora(layers_of(model), "default", flat.lowered)
    x = torch.randn(1, 4, 4, 6)
    model(x).sum().backward()
    assert x.grad is None and bool((flat.gradients[0] != 0).any())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lora_" not in name)


def test_in_bf16_the_product_is_as_accurate_as_peft_under_autocast():
    exact, _ = adapted()
    theirs, _ = adapted()
    ours, parameters = adapted()
    flat = FlatParameters([parameters], torch.bfloat16)
    use_fast_lora(layers_of(ours), "default", flat.lowered)
    for model in (theirs, ours):
        for layer in layers_of(model):
            layer.get_base_layer().bfloat16()
    x = torch.randn(8, 6, 6, 6)
    expected = exact(x)
    with torch.autocast("cpu", torch.bfloat16):
        their_error = (theirs(x.bfloat16()) - expected).norm()
    our_error = (ours(x.bfloat16()) - expected).norm()
    assert our_error < 1.05 * their_error and our_error < 0.02 * expected.norm()


def test_low_precision_copies_are_updated_by_lower():
    _, parameters = adapted()
    flat = FlatParameters([parameters[:2], parameters[2:]], torch.bfloat16)
    parameters[3].data.add_(1)
    before = flat.lowered(parameters[3]).clone()
    assert not torch.equal(before, parameters[3].bfloat16())
    flat.lower()
    for parameter in parameters:
        assert torch.equal(flat.lowered(parameter), parameter.bfloat16())


def test_dora_is_left_to_peft():
    model, _ = adapted()
    layers = layers_of(model)
    assert all(map(is_plain, layers))
    layers[0].dora_scale = torch.nn.Parameter(torch.ones(1, 6))
    before = [layer.forward for layer in layers]
    assert not use_fast_lora(layers, "default", lambda parameter: parameter)
    assert [layer.forward == forward for layer, forward in zip(layers, before, strict=True)] == [True, False, False]


def test_a_base_that_is_quantized_later_is_computed_by_plain_operators():
    theirs, _ = adapted()
    ours, parameters = adapted()
    flat = FlatParameters([parameters])
    use_fast_lora(layers_of(ours), "default", flat.lowered)
    for model in (theirs, ours):
        layer: Any = model.get_submodule("first")
        layer.base_layer = QuantizedLinear(layer.get_base_layer(), 8, torch.device("cpu"))
    x = torch.randn(1, 4, 4, 6)
    theirs(x).sum().backward()
    ours(x).sum().backward()
    expected = [parameter.grad.flatten() for parameter in theirs.parameters() if parameter.grad is not None]
    torch.testing.assert_close(flat.gradients[0], torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_flat_parameters_are_updated_like_separate_ones(name: str):
    results = []
    for flatten in (False, True):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(size)) for size in ((3, 5), (7,), (2, 2, 3))]
        second = (
            1e-2 if OPTIMIZERS[name].is_self_tuning else 1e-3
        )  # such an optimizer has one learning rate for all groups
        groups = param_groups([(1e-2, parameters[:2]), (second, parameters[2:])], parameters[1:2])
        flat = FlatParameters([group["params"] for group in groups]) if flatten else None
        optimizer = make_optimizer(name, groups, 0.1, flat)
        for _ in range(5):
            for parameter in parameters:
                gradient = (parameter * parameter.sin()).detach()
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad.copy_(gradient)
            optimizer.step()
        results.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


class Squares:
    """The loss (w x - 1)² of each sample, with x from its index. Counts computed and prepared passes."""

    seed = 0

    def __init__(self, weight: torch.nn.Parameter):
        self.weight, self.computed, self.prepared = weight, 0, 0

    def batch(self, samples: Sequence[Sample]) -> Batch:
        self.prepared += 1
        return {"x": torch.tensor([1.0 + sample.index for sample in samples])}

    def losses_of(self, batch: Batch) -> torch.Tensor:
        self.computed += 1
        return (self.weight * batch["x"] - 1).square()


def passes_with(capture: Capture | None) -> tuple[Passes, Squares, FlatParameters, list[str]]:
    weight = torch.nn.Parameter(torch.tensor([0.3]))
    reports: list[str] = []
    flat = FlatParameters([[weight]])
    squares = Squares(weight)
    return Passes(squares, flat, capture=capture, report=reports.append), squares, flat, reports


def test_captured_passes_add_the_same_gradients_for_any_order_of_shapes():
    eager, _, expected, _ = passes_with(None)
    captured, squares, found, reports = passes_with(recorded)
    for step, indices in enumerate([[0, 1], [2], [3, 4], [5], [6, 7]]):
        samples = [Sample(index, step, position) for position, index in enumerate(indices)]
        if step == 2:
            captured.prepare(samples)
        assert torch.equal(eager(samples, 4.0), captured(samples, 4.0))
        assert torch.equal(expected.gradients[0], found.gradients[0])
    assert len(captured.captured.by_shape) == 2 and squares.prepared == 5 and reports == []
    captured.forget()
    assert captured.captured.by_shape == {}


def test_dropout_does_not_depend_on_whether_a_pass_was_captured_before(
    monkeypatch: pytest.MonkeyPatch,
):
    """A resumed run captures again, in a step whose seed is set."""

    def dropped(self: Squares, batch: Batch) -> torch.Tensor:
        return (torch.nn.functional.dropout(self.weight * batch["x"]) - 1).square()

    monkeypatch.setattr(Squares, "losses_of", dropped)
    eager, captured = passes_with(None)[0], passes_with(recorded)[0]
    samples = [Sample(index, 0, index) for index in range(64)]
    for seed in range(3):
        losses = []
        for passes in (eager, captured):
            torch.manual_seed(seed)
            losses.append(passes(samples, 64.0))
        assert torch.equal(*losses)


def test_a_pass_that_cannot_be_captured_is_run_and_the_reason_is_reported_once():
    def refused(run: Replay) -> Replay:
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    eager, _, expected, _ = passes_with(None)
    uncaptured, _, found, reports = passes_with(refused)
    for step in range(3):
        samples = [Sample(step, step, 0)]
        assert torch.equal(eager(samples, 1.0), uncaptured(samples, 1.0))
    assert torch.equal(expected.gradients[0], found.gradients[0])
    reason = "operation not permitted when stream is capturing"
    assert reports == [f"CUDA graphs are off (kernels are launched one by one): {reason}"]


def test_a_pass_that_fails_once_is_captured_when_it_works_again(monkeypatch: pytest.MonkeyPatch):
    """As when torch.compile fails and is then undone."""
    passes, _, _, reports = passes_with(recorded)
    losses_of = Squares.losses_of

    def failing(self: Squares, batch: Batch) -> torch.Tensor:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(Squares, "losses_of", failing)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        passes([Sample(0, 0, 0)], 1.0)
    monkeypatch.setattr(Squares, "losses_of", losses_of)
    passes([Sample(0, 0, 0)], 1.0)
    assert len(passes.captured.by_shape) == 1 and reports == []


def test_inputs_prepared_for_another_pass_are_not_used():
    passes, squares, _, _ = passes_with(None)
    passes.prepare([Sample(9, 0, 0)])
    assert float(passes([Sample(1, 0, 0)], 1.0)) == pytest.approx((0.3 * 2 - 1) ** 2) and squares.prepared == 2


@pytest.mark.slow
def test_fifty_steps_match_pefts_forward_and_an_optimizer_of_separate_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def losses_and_file(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
        run = train_run(
            folder, network={"rank": 4, "text_encoder_rank": 2, "conv_rank": 2},
            optimization={"steps": 50, "batch_size": 1, "learning_rate": 1e-3, "text_encoder_lr": 1e-3},
            output={"preview_every": 0, "save_precision": "fp32"},
        )  # fmt: skip
        return run.losses, read_tensors(run.folder / "clay.safetensors")[0]

    our_losses, found = losses_and_file(tmp_path / "ours")
    monkeypatch.setattr(recipe, "use_fast_lora", lambda layers, adapter, lowered: False)
    monkeypatch.setattr(recipe, "make_optimizer", lambda name, groups, decay, flat: make_optimizer(name, groups, decay))
    their_losses, expected = losses_and_file(tmp_path / "theirs")
    assert our_losses == pytest.approx(their_losses, rel=1e-5)
    error = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    assert error <= 1e-3**2 * sum(float(tensor.square().sum()) for tensor in expected.values())
