"""An adapter of another rank: the same for every layer, or for each the one that keeps enough of it."""

from scumble.configs.errors import Refused
from scumble.configs.progress import tracked

from .adapter import Adapter
from .factors import Reduced, Reduction, check_biases, check_dora, check_finite, collect, kernel_of, reduced_change
from .keys import ModulePath
from .lowrank import Rule
from .weights import Weights


def resize(adapter: Adapter, rule: Rule, name: str, base: Weights | None = None) -> Reduction:
    """A LoRA of the ranks that `rule` gives, with the error of each block; other kinds become LoRA.

    A rank is never made larger than the layer's own. DoRA is computed on `base`'s weights. Raises `Refused` for DoRA
    without them and for impossible rules.
    """
    check_resize(rule)
    check_finite(name, adapter)
    check_biases(name, adapter)
    check_dora(name, adapter, base)
    modules: dict[ModulePath, Reduced] = {}
    for place, module in tracked(adapter.modules.items(), "resizing", len(adapter.modules)):
        found = reduced_change(place, module, rule, kernel_of(place, module, adapter.family), base)
        if not found:
            raise Refused(f"{name}: {place} is {module.label}, whose rank has no bound of its own: give --rank")
        modules[place] = found
    return collect(modules, adapter)


def check_resize(rule: Rule) -> None:
    """Raises `Refused` where a rule says nothing or something impossible."""
    if not (rule.rank or rule.energy or rule.ratio):
        raise Refused("say how far to reduce: --rank, --energy or --ratio")
    if rule.rank < 0:
        raise Refused(f"--rank {rule.rank}: use 1 or more")
    for flag, share in (("energy", rule.energy), ("ratio", rule.ratio)):
        if not 0 <= share <= 1:
            raise Refused(f"--{flag} {share:g}: a share is between 0 and 1")
