"""Grouped products against torch, which computes them apart. All numbers are whole, so that sums are exact in any order
and a difference is a fault."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter

from scumble.trainer.kernels import grouping
from scumble.trainer.kernels.cpu_tape import Recorder
from scumble.trainer.kernels.onednn_packing import can_pack
from scumble.trainer.kernels.program import Program, Room

ROWS, IN, OUT, RANK = 5, 4, 6, 2


def numbers(*shape: int) -> torch.Tensor:
    return torch.randint(-4, 5, shape).float()


class Layers:
    """Frozen weights, factors that change from run to run, and gradients that are added to."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        def whole(*shape: int) -> torch.Tensor:
            return numbers(*shape).to(dtype)

        self.x, self.g = whole(ROWS, IN), whole(ROWS, OUT)
        self.weights = [Parameter(whole(OUT, IN), requires_grad=False) for _ in range(3)]
        self.squares = [Parameter(whole(IN, IN), requires_grad=False) for _ in range(2)]
        self.bias = Parameter(whole(OUT), requires_grad=False)
        flat = whole(6 * RANK * IN)
        self.downs = [flat[start : start + RANK * IN].view(RANK, IN) for start in range(0, len(flat), RANK * IN)]
        self.up = whole(OUT, RANK)
        self.total = whole(3 * OUT * IN)
        self.totals = [self.total[start : start + OUT * IN].view(OUT, IN) for start in range(0, 3 * OUT * IN, OUT * IN)]

    def change(self) -> None:
        for tensor in (self.x, self.g, self.up, *self.downs):
            tensor.copy_(numbers(*tensor.shape))


Function = Callable[[Layers], torch.Tensor]


def replayed(function: Function, dtype: torch.dtype = torch.float32, room: int = 2**20) -> Counter[str]:
    """How many operators of each name are left, once replays on other numbers gave what the function gives."""
    torch.manual_seed(0)
    layers, recorder = Layers(dtype), Recorder(Program(room=Room(room)))
    with recorder:
        result = function(layers)
    replay = recorder.finished(result)
    for _ in range(3):
        layers.change()
        before = layers.total.clone(), layers.x.clone()
        found = [replay().clone(), layers.total.clone()]
        layers.total.copy_(before[0])
        layers.x.copy_(before[1])
        assert all(map(torch.equal, found, [function(layers), layers.total]))
    return Counter(getattr(node.target, "__name__", "") for node in recorder.program.calls)


def test_a_layer_and_its_factor_are_one_product():
    def function(layers: Layers) -> torch.Tensor:
        inner = layers.x @ layers.downs[0].t()
        return torch.nn.functional.linear(layers.x, layers.weights[0]).sum() + inner.pow(2).sum()

    found = replayed(function)
    assert found["mm"] == 1 and found["_foreach_copy_"] == 1


def test_layers_with_and_without_bias_are_one_product_and_may_be_changed_in_place():
    def function(layers: Layers) -> torch.Tensor:
        outs = [torch.nn.functional.linear(layers.x, one) for one in layers.weights[:2]]
        outs.append(torch.nn.functional.linear(layers.x, layers.weights[2], layers.bias))
        outs[1].addmm_(layers.x @ layers.downs[1].t(), layers.up.t(), alpha=2)
        heads = [one.view(ROWS, 2, OUT // 2).permute(1, 0, 2) for one in outs]
        return (heads[0] @ heads[1].transpose(1, 2)).sum() + heads[2].square().sum() + outs[1].sum()

    found = replayed(function)
    assert found["mm"] == 0 and found["addmm"] == 1 and found["addmm_"] == 1


def test_gradients_through_a_layer_and_its_factor_are_one_product():
    def function(layers: Layers) -> torch.Tensor:
        before = layers.g @ layers.up
        return (layers.g @ layers.weights[0]).addmm_(before, layers.downs[0]).square().sum()

    found = replayed(function)
    assert found["mm"] == 1 and found["_foreach_copy_"] == 1


def test_products_are_joined_as_long_as_there_is_room():
    def function(layers: Layers) -> torch.Tensor:
        return (layers.x @ layers.weights[0].t()).sum() + (layers.x @ layers.weights[1].t()).sum()

    both = 2 * 4 * IN * OUT
    assert replayed(function, room=both)["mm"] == 1 and replayed(function, room=both - 1)["mm"] == 2


needs_onednn = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this torch has no oneDNN")


@needs_onednn
def test_in_bf16_several_layers_are_one_product_laid_out_once_and_their_factors_another():
    def function(layers: Layers) -> torch.Tensor:
        outs = [torch.nn.functional.linear(layers.x, one) for one in layers.weights[:2]]
        outs.append(torch.nn.functional.linear(layers.x, layers.weights[2], layers.bias))
        for out, down in zip(outs, layers.downs, strict=False):
            out.addmm_(layers.x @ down.t(), layers.up.t(), alpha=2)
        return torch.stack([out.float().square().sum() for out in outs])

    found = replayed(function, torch.bfloat16)
    assert (found["_linear_pointwise.default"], found["mm"], found["addmm"], found["_foreach_copy_"]) == (1, 1, 0, 1)


@needs_onednn
def test_in_bf16_one_layer_without_bias_stays_with_its_factor():
    def function(layers: Layers) -> torch.Tensor:
        inner = layers.x @ layers.downs[0].t()
        return torch.nn.functional.linear(layers.x, layers.weights[0]).addmm_(inner, layers.up.t()).float().sum()

    found = replayed(function, torch.bfloat16)
    assert (found["_linear_pointwise.default"], found["mm"]) == (0, 1)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
def test_frozen_layers_in_bf16_are_laid_out_once(bias: bool):
    def function(layers: Layers) -> torch.Tensor:
        x = torch.nn.functional.linear(layers.x, layers.weights[0], layers.bias if bias else None)
        return (x.sin() @ layers.weights[1]).float().sum() + (x.cos() @ layers.weights[1]).float().sum()

    found = replayed(function, torch.bfloat16)
    assert (found["_linear_pointwise.default"], found["mm"], found["addmm"]) == (3, 0, 0)
    assert replayed(function)["_linear_pointwise.default"] == 0  # in fp32 another library computes
    assert replayed(function, torch.bfloat16, room=2 * IN * OUT)["_linear_pointwise.default"] == 1


@needs_onednn
@pytest.mark.parametrize(
    "function",
    [
        lambda layers: (layers.x @ layers.downs[0].t()).float().sum(),
        lambda layers: (layers.g.t() @ layers.x).float().sum(),
        lambda layers: torch.nn.functional.linear(layers.x, layers.weights[0], layers.up[:, 0]).float().sum(),
        lambda layers: torch.addmm(layers.bias[:1], layers.x, layers.weights[0].t()).float().sum(),
        lambda layers: (layers.total[: ROWS * OUT].view(OUT, ROWS).t() @ layers.weights[0]).float().sum(),
    ],
    ids=[
        "a factor",
        "nothing constant",
        "a bias that changes",
        "a bias of one number",
        "turned rows",
    ],
)
def test_other_products_in_bf16_are_not(function: Function):
    found = replayed(function, torch.bfloat16)
    assert found["_linear_pointwise.default"] == 0 and found["mm"] + found["addmm"] == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda layers: (
            (layers.x @ layers.weights[0].t()).view(-1)[3:-1].sum() + (layers.x @ layers.weights[1].t()).sum()
        ),
        lambda layers: (layers.x @ layers.downs[0].t()).sum() + (layers.x @ layers.downs[1].t()).sum(),
        lambda layers: (layers.x @ layers.weights[0].t()).sum() + (layers.x.sin() @ layers.weights[1].t()).sum(),
        lambda layers: (layers.x @ layers.weights[0].t()).sum() + (layers.x.mul_(2) @ layers.weights[1].t()).sum(),
    ],
    ids=["a view over the edges of rows", "nothing frozen", "another left side", "a left side that changes"],
)
def test_what_cannot_be_one_product_is_not(function: Function):
    assert replayed(function)["mm"] == 2


def test_a_left_side_that_is_part_of_a_product_itself_is_that_part():
    """As where the gradient that a projection passes on is what a layer's gradient comes from."""

    def function(layers: Layers) -> torch.Tensor:
        gradient = (layers.g @ layers.weights[0]).addmm_(layers.g @ layers.up, layers.downs[0])  # (ROWS, IN)
        first, second = (gradient @ one for one in layers.squares)
        return first.square().sum() + second.square().sum()

    found = replayed(function)
    assert found["mm"] == 2


def test_gradients_of_one_shape_are_one_batched_product():
    def function(layers: Layers) -> torch.Tensor:
        for number, total in enumerate(layers.totals):
            total.add_((layers.g * (number + 1)).t() @ (layers.x + number), alpha=3)
        return layers.g.sum()

    found = replayed(function)
    assert (found["mm"], found["add_"], found["bmm"], found["_foreach_add_"]) == (0, 0, 1, 1)


def read_between(layers: Layers) -> torch.Tensor:
    layers.totals[0].add_(layers.g.t() @ layers.x)
    read = layers.totals[0].sum()
    layers.totals[1].add_(layers.g.t() @ layers.x)
    return read


def added_twice(layers: Layers) -> torch.Tensor:
    for number in range(2):
        layers.totals[0].add_(layers.g.t() @ (layers.x + number))
    return layers.x.sum()


def read_by_another_sum(layers: Layers) -> torch.Tensor:
    for number in range(2):
        layers.totals[number].add_(layers.g.t() @ (layers.x + number))
    layers.totals[2].add_(layers.totals[0])
    return layers.x.sum()


def overlapping(layers: Layers) -> torch.Tensor:
    for start in (0, 2):
        layers.total[start : start + OUT * IN].view(OUT, IN).add_(layers.g.t() @ layers.x)
    return layers.x.sum()


def operands_that_change(layers: Layers) -> torch.Tensor:
    y = layers.g.sin().round()
    for total in layers.totals:
        total.add_(y.t() @ layers.x)
        y.mul_(2)
    return y.sum()


def used_otherwise(layers: Layers) -> torch.Tensor:
    products = [layers.g.t() @ (layers.x + number) for number in range(3)]
    for total, product in zip(layers.totals, products, strict=True):
        total.add_(product)
    return torch.stack(products).sum()


@pytest.mark.parametrize(
    "function", [read_between, added_twice, read_by_another_sum, overlapping, operands_that_change, used_otherwise]
)
def test_what_cannot_wait_does_not(function: Function):
    found = replayed(function)
    assert found["_foreach_add_"] == 0 and found["add_"] >= 2


def test_different_shapes_and_scales_are_batches_of_their_own():
    def function(layers: Layers) -> torch.Tensor:
        for number in range(2):
            layers.totals[number].add_(layers.g.t() @ (layers.x + number), alpha=2)
        layers.totals[2].add_(layers.g.t() @ layers.x, alpha=3)
        return layers.g.sum()

    found = replayed(function)
    assert (found["bmm"], found["_foreach_add_"], found["mm"], found["add_"]) == (1, 1, 1, 1)


def test_products_wait_only_as_long_as_they_take_little_memory(monkeypatch: pytest.MonkeyPatch):
    def function(layers: Layers) -> torch.Tensor:
        for number, total in enumerate(layers.totals):
            total.add_((layers.g * (number + 1)).t() @ (layers.x + number))
        return layers.g.sum()

    sides = 4 * ROWS * (IN + OUT)
    monkeypatch.setattr(grouping, "MAX_WAITING_BYTES", 2 * sides)
    found = replayed(function)
    assert (found["bmm"], found["mm"]) == (1, 1)
    monkeypatch.setattr(grouping, "MAX_WAITING_BYTES", 2 * sides - 1)
    assert replayed(function)["mm"] == 3
