"""torch.compile: kept where a step is faster for it, undone where not or where the compiler fails."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from scumble.trainer.kernels.compile import compile_blocks


class Unet(torch.nn.Module):
    """Compiles as diffusers' UNets do: each block is called through what the compiler made."""

    def __init__(self, error: Exception | None = None):
        super().__init__()
        self.block, self.error = torch.nn.Linear(1, 1), error

    def compile_repeated_blocks(self) -> None:
        self.block._compiled_call_impl = lambda x: x
        if self.error:
            raise self.error

    @property
    def is_compiled(self) -> bool:
        return self.block._compiled_call_impl is not None


def taking(*seconds: float) -> Callable[[], float]:
    left: Iterator[float] = iter(seconds)
    return lambda: next(left)


@pytest.mark.parametrize(("whatever", "after", "kept"), [(False, 0.8, True), (False, 1.2, False), (True, 1.2, True)])
def test_what_is_compiled_stays_where_a_step_is_faster_or_where_it_was_asked_for(
    whatever: bool, after: float, kept: bool
):
    unet: Any = Unet()
    said: list[str] = []
    found = compile_blocks(unet, taking(60.0, after + 0.1, after), 1.0, whatever, said.append)
    assert unet.is_compiled == kept and found == (after if kept else None)
    if kept:
        assert said == [f"compiled: a step takes {after:.3g} s instead of 1 s"]
    else:
        assert said == ["torch.compile is off: a step would take 1.2 s instead of 1 s"]


def test_a_compiler_that_fails_leaves_the_run_as_it_was_with_the_reason():
    unet: Any = Unet(RuntimeError("no C++ compiler\nmore"))
    said: list[str] = []
    assert compile_blocks(unet, taking(), 1.0, True, said.append) is None
    assert not unet.is_compiled and said == ["torch.compile is off: RuntimeError: no C++ compiler"]
