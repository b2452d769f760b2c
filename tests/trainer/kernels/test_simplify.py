"""Simplified recordings against torch, which runs what was recorded: the same to the bit, by fewer operators."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from scumble.trainer.kernels.cpu_tape import Recorder

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def replayed(function: Function) -> Counter[str]:
    """How many operators of each name are left of a function of x and of a total that it may change, which is
    replayed on other numbers than it was recorded with, and gives the same."""
    x, total, recorder = torch.randn(4, 6), torch.zeros(4, 6), Recorder()
    with recorder:
        result = function(x, total)
    names = [str(node.target) for node in recorder.program.graph.nodes if node.op == "call_function"]
    replay = recorder.finished(result)
    left = [getattr(node.target, "__name__", "") for node in recorder.program.graph.nodes if node.op == "call_function"]
    assert len(left) <= len(names)
    for seed in range(3):
        x.copy_(torch.randn(4, 6))
        before, other = x.clone(), total.clone()
        torch.manual_seed(seed)
        found = replay().clone()
        torch.manual_seed(seed)
        assert torch.equal(found, function(before, other))
        assert torch.equal(x, before) and torch.equal(total, other)
        total.copy_(other)
    return Counter(left)


def test_views_of_views_are_taken_from_memory():
    def function(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        return y.t().reshape(2, 3, 4)[1].unsqueeze(0).permute(2, 0, 1).cos() + y.view(2, 2, 6)[0].view(4, 3).view(
            4, 1, 3
        )

    assert replayed(function) == {"sin": 1, "as_strided": 2, "cos": 1, "add": 1}


def test_a_view_that_is_as_what_it_views_is_not_taken():
    assert replayed(lambda x, total: x.sin().view(24).view(4, 6).detach().cos()) == {"sin": 1, "cos": 1}


def test_parts_are_views_too():
    def function(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        first, second = x.sin().split([1, 3])
        return first + second.chunk(3, 1)[2].sum()

    assert replayed(function) == {"sin": 1, "as_strided": 2, "sum": 1, "add": 1}


def test_what_was_computed_before_is_not_computed_again():
    def function(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        return (y.cos().view(24) * y.view(24) + y.cos().view(24).view(24)).t() + y.view(24)

    assert replayed(function) == {"sin": 1, "cos": 1, "as_strided": 2, "mul": 1, "add": 2}


@pytest.mark.parametrize(
    "function",
    [lambda x, total: x.sin() / 1.0 * 1, lambda x, total: x.sin().clone(), lambda x, total: x.sin()[:].clone() / 1],
)
def test_what_changes_nothing_is_left_out(function: Function):
    assert replayed(function) == {"sin": 1}


def test_a_copy_in_another_order_is_made():
    assert replayed(lambda x, total: x.sin().t().clone(memory_format=torch.contiguous_format))["clone"] == 1


def test_numbers_of_another_type_or_sign_are_others():
    def function(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        low = [y * 0.0, y * -0.0, y * 2, y * 2.0, y.to(torch.float64), y.to(torch.bfloat16)]
        return torch.stack([1 / one.double() if number < 2 else one.double() for number, one in enumerate(low)])

    assert replayed(function)["mul"] == 4


def in_place(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Sums that only seem to be the same, since what they sum changes between; and copies of it."""
    y = x.sin()
    before, kept, aside = y.sum(), y.clone(), y / 1
    y.view(24)[3:].mul_(2)
    return before + y.sum() + kept.sum() + aside.sum() + aside.add_(1).sum()


def of_two_alike(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    one, other = x.sin(), x.sin()
    one.mul_(2)
    return one.sum() + other.sum()


def of_the_total(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    before = total.sum()
    total[1:].add_(x[1:])
    return before + total.sum()


def of_the_total_by_another_view(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    before = total.view(24).sum()
    total.t().add_(x.t())
    return before + total.view(24).sum()


def into_what_is_there(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    y = x.cos()
    before = y.sum() + torch.sin(x, out=y).sum()
    return before + y.sum()


@pytest.mark.parametrize(
    "function", [in_place, of_two_alike, of_the_total, of_the_total_by_another_view, into_what_is_there]
)
def test_what_is_changed_in_place_is_not_taken_for_the_same(function: Function):
    assert replayed(function)["sum"] >= 2


def test_what_was_changed_for_the_last_time_is_as_what_was_never_changed():
    def function(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        before = y.cos()
        y.mul_(2)
        return before + (y / 1.0).cos() + y.clone().cos()

    assert replayed(function) == {"sin": 1, "cos": 2, "mul_": 1, "add": 2}


def test_chance_is_drawn_each_time():
    def function(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        return torch.nn.functional.dropout(y) + torch.nn.functional.dropout(y) + torch.rand_like(y) - torch.rand_like(y)

    replayed(function)


def test_numbers_seen_as_other_numbers_are_views_of_their_own():
    def function(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return x.sin().view(torch.int32).view(24).bitwise_and(-65536).view(torch.float32).view(4, 6)[1:].cos()

    replayed(function)


def test_a_copy_of_an_input_is_made():
    x, recorder = torch.ones(3), Recorder()
    with recorder:
        result = x.clone()
    copy = recorder.finished(result)()
    x.zero_()
    assert copy.tolist() == [1, 1, 1]


def test_what_is_recomputed_for_a_backward_pass_is_not_kept_instead():
    """Gradient checkpointing saves memory by that."""
    layer = torch.nn.Linear(6, 6).requires_grad_(False)

    def function(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        given = x.detach().requires_grad_(True)
        out = checkpoint(lambda y: layer(y).tanh().sin(), given, use_reentrant=False)
        assert isinstance(out, torch.Tensor)
        out.sum().backward()
        assert given.grad is not None
        return given.grad

    assert replayed(function)["tanh"] == 2
