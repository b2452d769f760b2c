"""torch.compile for the UNet's repeated blocks, if a measured step gets faster."""

from collections.abc import Callable

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

MIN_RUN_S = 900  # a run of this length regains the minutes spent compiling


def compile_blocks(
    unet: UNet2DConditionModel, seconds_of: Callable[[], float], before_s: float, force: bool,
    report: Callable[[str], None],
) -> float | None:  # fmt: skip
    """Compile each kind of block once. Returns the new seconds per step, or None if compilation was undone.

    `seconds_of` runs a step and returns its time, which was `before_s` so far. The compiled blocks are kept if that is
    lower now, or if `force` is true. If the compiler fails or is not installed, the blocks stay uncompiled.
    """
    try:
        unet.compile_repeated_blocks()
        seconds_of()  # compiles
        seconds = min(seconds_of() for _ in range(2))
    except (RuntimeError, ImportError, OSError) as error:
        _undo(unet)
        report(f"torch.compile is off: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        return None
    if seconds < before_s or force:
        report(f"compiled: a step takes {seconds:.3g} s instead of {before_s:.3g} s")
        return seconds
    _undo(unet)
    report(f"torch.compile is off: a step would take {seconds:.3g} s instead of {before_s:.3g} s")
    return None


def _undo(unet: UNet2DConditionModel) -> None:
    for module in unet.modules():
        module._compiled_call_impl = None
    torch.compiler.reset()
