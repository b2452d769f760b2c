"""An adapter of another rank: the same for every layer, or for each the one that keeps enough of it."""

from collections.abc import Callable

from scumble.configs.errors import Refused

from .adapter import Adapter, Module
from .factors import (
    Reduced,
    Reduction,
    collect,
    dtype_of,
    factors_of,
    has_factors,
    kernel_of,
    reduced,
    refuse_dora,
)  # fmt: skip
from .keys import Place
from .lowrank import Rule, svd_of_dense, svd_of_factors


def resize(
    adapter: Adapter, rule: Rule, name: str, progress: Callable[[int, int], None] = lambda _done, _all: None
) -> Reduction:
    """A LoRA of the ranks that `rule` gives, with the error of each block; LoHa and LoKr become LoRA.

    A rank is never made larger than the layer's own. Raises `Refused` for DoRA and for impossible rules.
    """
    check(rule)
    refuse_dora(name, adapter)
    modules: dict[Place, Reduced] = {}
    for number, (place, module) in enumerate(adapter.modules.items(), 1):
        modules[place] = _resized(module, rule, kernel_of(place, module, adapter.family), f"{name}: {place.path}")
        progress(number, len(adapter.modules))
    return collect(modules, adapter)


def check(rule: Rule) -> None:
    """Raises `Refused` where a rule says nothing or something impossible."""
    if not (rule.rank or rule.energy or rule.ratio):
        raise Refused("say how far to reduce: --rank, --energy or --ratio")
    if rule.rank < 0:
        raise Refused(f"--rank {rule.rank}: use 1 or more")
    for flag, share in (("energy", rule.energy), ("ratio", rule.ratio)):
        if not 0 <= share <= 1:
            raise Refused(f"--{flag} {share:g}: a share is between 0 and 1")


def _resized(module: Module, rule: Rule, kernel: tuple[int, ...], where: str) -> Reduced:
    if has_factors(module):
        return reduced(svd_of_factors(*factors_of(module)), rule, kernel, dtype_of(module))
    if not rule.rank:
        raise Refused(f"{where} is {module.kind}, whose rank has no bound of its own: give --rank too")
    delta = module.delta()
    total = float(delta.double().square().sum())
    return reduced(svd_of_dense(delta, rule.rank), rule, kernel, dtype_of(module), total)
