"""Does an adapter fit a base: every layer is there and has its shape, DoRA's magnitudes are as many."""

from collections.abc import Iterator

from scumble.configs.errors import Refused

from .adapter import Adapter
from .keys import ModulePath
from .module import Module, matrix_of
from .weights import Weights


def misfits(adapter: Adapter, weights: Weights) -> Iterator[tuple[ModulePath, str]]:
    """Each module that does not fit, and why, in words that follow its name."""
    for place, module in adapter.modules.items():
        if place not in weights.spots:
            yield place, "is not in the base"
            continue
        shape = weights.spots[place].shape
        if module.shape != matrix_of(shape):
            yield place, f"is {_times(module.shape)} and the base's layer {_times(matrix_of(shape))}"
        elif module.is_dora and not _has_magnitudes_for(module, shape):
            magnitude = tuple(module.tensors["dora_scale"].shape)
            yield place, f"has DoRA magnitudes {magnitude}, neither one for each input nor for each output"


def check_fit(name: str, adapter: Adapter, weights: Weights) -> None:
    """Raises `Refused` where a module does not fit; `name` is the adapter's."""
    found = list(misfits(adapter, weights))
    if found:
        place, why = found[0]
        if adapter.family != weights.family:
            raise Refused(f"{name}: is for {adapter.family}, but {weights.path} is {weights.family}")
        more = f" ({len(found)} of {len(adapter.modules)} do not fit)" if len(found) > 1 else ""
        raise Refused(f"{name}: {place} {why}{more}; it is for another base than {weights.path}")


def _has_magnitudes_for(module: Module, shape: tuple[int, ...]) -> bool:
    ones = (1,) * (len(shape) - 2)
    return tuple(module.tensors["dora_scale"].shape) in ((1, shape[1], *ones), (shape[0], 1, *ones))


def _times(shape: tuple[int, int] | None) -> str:
    return f"{shape[0]} x {shape[1]}" if shape else "of no shape"
