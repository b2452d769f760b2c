"""Check that an adapter fits a base: all layers exist, and their shapes and DoRA magnitudes match."""

from collections.abc import Iterator

from scumble.configs.errors import Refused

from .adapter import Adapter
from .keys import ModulePath
from .module import Module, matrix_of
from .weights import Weights


def misfits(adapter: Adapter, weights: Weights) -> Iterator[tuple[ModulePath, str]]:
    """Yield each module that does not fit, and the reason as a phrase that follows its name."""
    for layer, module in adapter.modules.items():
        if layer not in weights.layers:
            yield layer, "is not in the base"
            continue
        shape = weights.layers[layer].shape
        if module.shape != matrix_of(shape):
            yield layer, f"is {_times(module.shape)}, but the base's layer is {_times(matrix_of(shape))}"
        elif module.is_dora and not _has_magnitudes_for(module, shape):
            magnitude = tuple(module.tensors["dora_scale"].shape)
            yield layer, f"has DoRA magnitudes of shape {magnitude}, expected one per input or one per output"


def check_fit(name: str, adapter: Adapter, weights: Weights) -> None:
    """Raises `Refused` if a module does not fit. `name` is the adapter's name."""
    found = list(misfits(adapter, weights))
    if found:
        layer, reason = found[0]
        if adapter.family != weights.family:
            raise Refused(f"{name}: made for {adapter.family}, but {weights.path} is {weights.family}")
        more = f" ({len(found)} of {len(adapter.modules)} modules do not fit)" if len(found) > 1 else ""
        raise Refused(f"{name}: {layer} {reason}{more}; this adapter was made for a different base than {weights.path}")


def _has_magnitudes_for(module: Module, shape: tuple[int, ...]) -> bool:
    ones = (1,) * (len(shape) - 2)
    return tuple(module.tensors["dora_scale"].shape) in ((1, shape[1], *ones), (shape[0], 1, *ones))


def _times(shape: tuple[int, int] | None) -> str:
    return f"{shape[0]} x {shape[1]}" if shape else "of unknown shape"
