"""Reduce the rank of an adapter: to one rank for all layers, or per layer to the smallest rank that keeps enough."""

from scumble.configs.errors import Refused
from scumble.configs.progress import tracked

from .adapter import Adapter
from .factors import Reduced, Reduction, check_biases, check_dora, check_finite, collect, kernel_of, reduced_change
from .keys import ModulePath
from .lowrank import Rule
from .weights import Weights


def resize(adapter: Adapter, rule: Rule, name: str, base: Weights | None = None) -> Reduction:
    """Return a LoRA with the ranks that `rule` gives, and the error of each block. Other kinds are converted to LoRA.

    A layer's rank never grows. DoRA needs the weights of `base`. Raises `Refused` for DoRA without a base and for
    invalid rules.
    """
    check_resize(rule)
    check_finite(name, adapter)
    check_biases(name, adapter)
    check_dora(name, adapter, base)
    modules: dict[ModulePath, Reduced] = {}
    for layer, module in tracked(adapter.modules.items(), "resizing", len(adapter.modules)):
        found = reduced_change(layer, module, rule, kernel_of(layer, module, adapter.family), base)
        if not found:
            raise Refused(f"{name}: {layer} is {module.label}, which does not limit the rank; set --rank")
        modules[layer] = found
    return collect(modules, adapter)


def check_resize(rule: Rule) -> None:
    """Raises `Refused` if a rule is empty or invalid."""
    if not (rule.rank or rule.energy or rule.ratio):
        raise Refused("adapter resize: no target is set; use --rank, --energy or --ratio")
    if rule.rank < 0:
        raise Refused(f"--rank {rule.rank}: must be 0 or more (0: no limit)")
    for flag, share in (("energy", rule.energy), ("ratio", rule.ratio)):
        if not 0 <= share <= 1:
            raise Refused(f"--{flag} {share:g}: must be a number from 0 to 1")
