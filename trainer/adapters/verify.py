"""Verify an adapter file: every UI matches every key, all values and shapes are valid, and diffusers agrees.

The diffusers check: the base's output after `load_lora_weights` must equal its output with our dW added, for whole
components if the base fits into memory, else layer by layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch

from scumble.configs.errors import Refused
from scumble.configs.options import Model

from ..base_model.detect import detect_base
from ..base_model.load import load
from .adapter import Adapter, from_tensors, read_named
from .compatibility import misfits
from .forward_check import LayerCheck, checked_by_layer, checked_forward, too_large
from .inspect import COMPONENT_LABELS, FAMILY_LABELS, diffusers_limit, incomplete_uis, network_of
from .ui_keys import Match, matches
from .weights import Weights, find_weights


@dataclass(frozen=True)
class Verdict:
    """The result of `verify`. `faults` has one line for each problem with a layer or an output.

    `incomplete_uis` are the UIs that do not load all modules. The other texts are empty if they do not apply:
    `diffusers_limit` says why diffusers cannot apply this kind of adapter, `skip_reason` why it was not checked in
    diffusers, `by_layer_reason` why its layers were checked one by one. `dialect` is kohya or peft.
    """

    uis: tuple[Match, ...]
    incomplete_uis: tuple[str, ...]
    diffusers_limit: str
    checks: tuple[LayerCheck, ...]
    skip_reason: str
    by_layer_reason: str
    faults: tuple[str, ...]
    dialect: str

    @property
    def is_sound(self) -> bool:
        return not self.faults and not self.incomplete_uis


def verify(file: Path, base: str, quick: bool = False) -> Verdict:
    """Verify `file` for a base (as in `--base`). With `quick`, the base is not loaded and no outputs are compared.

    Raises `Refused` if `file` is not an adapter, or `base` is not a base or has another family.
    """
    tensors, metadata = read_named(file)
    adapter = from_tensors(tensors, metadata, str(file))
    model = Model(base=base)
    source = detect_base(model)
    if adapter.family != source.family.name:
        labels = FAMILY_LABELS[adapter.family], FAMILY_LABELS[source.family.name]
        raise Refused(f"{file}: made for {labels[0]}, but --base {base} is {labels[1]}; use a base of the same family")
    weights = find_weights(Path(source.path))
    uis = tuple(matches(tensors, weights.layers, adapter.family))
    network = network_of(adapter)
    limit, incomplete = diffusers_limit(network), incomplete_uis(uis, network)
    faults = list(_layer_faults(adapter, weights))
    reasons = {
        f"diffusers {limit}": bool(limit),
        "--quick is set": quick,
        "fix the faults below first": bool(faults),
        "diffusers does not load all modules": "diffusers" in incomplete,
    }
    skip_reason = next((reason for reason, applies in reasons.items() if applies), "")
    checks: list[LayerCheck] = []
    by_layer_reason = ""
    if not faults and not quick:
        diffusers_file = None if skip_reason else file
        if by_layer_reason := too_large(weights, adapter):
            checks += checked_by_layer(source, weights, adapter, diffusers_file)
        else:
            checks += checked_forward(load(model, source, torch.device("cpu"), torch.float32), adapter, diffusers_file)
        faults += [_fault_of(check) for check in checks if not check.agrees]
    return Verdict(uis, incomplete, limit, tuple(checks), skip_reason, by_layer_reason, tuple(faults), adapter.dialect)


def describe_checks(checks: Sequence[LayerCheck], by_layer_reason: str) -> Iterator[str]:
    """Yield a line for each component: how much the adapter changes its output, and how much diffusers differs from us.

    `by_layer_reason` says why the layers were checked one by one, or is empty.
    """
    if by_layer_reason:
        yield f"checked layer by layer: {by_layer_reason}"
    for component in dict.fromkeys(check.component for check in checks):
        own = [check for check in checks if check.component == component]
        effect = max(check.effect for check in own)
        change = f"the adapter changes the output by {effect:.2g}"
        if by_layer_reason:
            unchanged = sum(check.effect == 0 for check in own)
            more = f", {unchanged} unchanged" if unchanged else ""
            change = f"the adapter changes the outputs of {len(own)} layers by up to {effect:.2g}{more}"
        differences = [check.difference for check in own if check.difference is not None]
        comparison = f"; diffusers differs from ours by {max(differences):.2g}" if differences else ""
        yield f"{COMPONENT_LABELS[component]}: {change}{comparison}"


def _layer_faults(adapter: Adapter, weights: Weights) -> Iterator[str]:
    """Yield the faults of single layers that can be found without running the base."""
    for layer, reason in misfits(adapter, weights):
        yield f"{layer}: {reason}"
    for layer, module in adapter.modules.items():
        if not module.is_finite:
            yield f"{layer}: has non-finite values (NaN or Inf)"
        if module.is_dora and module.tensors["dora_scale"].shape[0] != 1:
            yield f"{layer}: has per-output DoRA magnitudes, which UIs compute differently; use `scumble adapter bake`"


def _fault_of(check: LayerCheck) -> str:
    if not isfinite(check.effect):
        return f"{check.name}: its output with the adapter is not finite"
    return (
        f"{check.name}: the output in diffusers differs from ours by {check.difference:.2g}, "
        f"and the adapter changes it by {check.effect:.2g}"
    )
