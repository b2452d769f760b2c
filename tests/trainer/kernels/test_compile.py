"""torch.compile: kept if a step gets faster, undone if not or if the compiler fails."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from scumble.trainer.kernels.compile import compile_blocks


class Unet(torch.nn.Module):
    """Compiles like the UNets of diffusers: each block is called through its compiled function."""

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


def step_times(*seconds: float) -> Callable[[], float]:
    remaining: Iterator[float] = iter(seconds)
    return lambda: next(remaining)


@pytest.mark.parametrize(("forced", "after_s", "kept"), [(False, 0.8, True), (False, 1.2, False), (True, 1.2, True)])
def test_compiled_blocks_are_kept_if_a_step_is_faster_or_compilation_was_requested(
    forced: bool, after_s: float, kept: bool
):
    unet: Any = Unet()
    reports: list[str] = []
    found = compile_blocks(unet, step_times(60.0, after_s + 0.1, after_s), 1.0, forced, reports.append)
    assert unet.is_compiled == kept and found == (after_s if kept else None)
    if kept:
        assert reports == [f"compiled: a step takes {after_s:.3g} s instead of 1 s"]
    else:
        assert reports == ["torch.compile is off: a step would take 1.2 s instead of 1 s"]


def test_if_the_compiler_fails_the_blocks_stay_uncompiled_and_the_reason_is_reported():
    unet: Any = Unet(RuntimeError("no C++ compiler\nmore"))
    reports: list[str] = []
    assert compile_blocks(unet, step_times(), 1.0, True, reports.append) is None
    assert not unet.is_compiled and reports == ["torch.compile is off: RuntimeError: no C++ compiler"]
