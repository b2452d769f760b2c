"""Does an adapter file work: every key has a home in every UI, every number and shape is right, diffusers agrees.

The proof by diffusers: what the base computes after `load_lora_weights` must be what it computes with our dW added,
as a whole where it fits into memory, else layer by layer.
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
from .inspect import COMPONENT_LABELS, FAMILY_LABELS, beyond_diffusers, network_of, poor_uis
from .ui_keys import Match, matches
from .weights import Weights, find_weights


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a file's layers and results, a line each in `faults`; the UIs' shares, the trials on the base.

    `poor` are the UIs that do not read it whole; `beyond_diffusers` says why diffusers cannot do what it says, and
    `untried` why it was not tried there, or nothing; `parted` why its layers were tried one by one, or nothing;
    `dialect` is how its keys are named, kohya or peft.
    """

    uis: tuple[Match, ...]
    poor: tuple[str, ...]
    beyond_diffusers: str
    trials: tuple[LayerCheck, ...]
    untried: str
    parted: str
    faults: tuple[str, ...]
    dialect: str

    @property
    def is_sound(self) -> bool:
        return not self.faults and not self.poor


def verify(file: Path, base: str, quick: bool = False) -> Verdict:
    """Check `file` for a base (as in `--base`); `quick` leaves out the trials, so that nothing is loaded.

    Raises `Refused` where the file is no adapter or the base is none.
    """
    tensors, metadata = read_named(file)
    adapter = from_tensors(tensors, metadata, str(file))
    model = Model(base=base)
    source = detect_base(model)
    if adapter.family != source.family.name:
        labels = FAMILY_LABELS[adapter.family], FAMILY_LABELS[source.family.name]
        raise Refused(f"{file}: is for {labels[0]}, but --base {base} is {labels[1]}; name a base of its kind")
    weights = find_weights(Path(source.place))
    uis = tuple(matches(tensors, weights.spots, adapter.family))
    network = network_of(adapter)
    foreign, poor = beyond_diffusers(network), poor_uis(uis, network)
    faults = list(_faults(adapter, weights))
    reasons = {
        foreign: True,
        "--quick was asked for": quick,
        "its layers come first": bool(faults),
        "it does not read the file whole": "diffusers" in poor,
    }
    untried = next((reason for reason, holds in reasons.items() if reason and holds), "")
    trials: list[LayerCheck] = []
    parted = ""
    if not faults and not quick:
        by_diffusers = None if untried else file
        if parted := too_large(weights, adapter):
            trials += checked_by_layer(source, weights, adapter, by_diffusers)
        else:
            trials += checked_forward(load(model, source, torch.device("cpu"), torch.float32), adapter, by_diffusers)
        faults += [_fault_of(trial) for trial in trials if not trial.agrees]
    return Verdict(uis, poor, foreign, tuple(trials), untried, parted, tuple(faults), adapter.dialect)


def trial_lines(trials: Sequence[LayerCheck], parted: str) -> Iterator[str]:
    """How far the adapter moves a component's output, or those of its layers, and how far diffusers' differ from ours.

    `parted` says why layers were tried, one by one.
    """
    if parted:
        yield f"tried layer by layer: {parted}"
    for component in dict.fromkeys(trial.component for trial in trials):
        own = [trial for trial in trials if trial.component == component]
        effect = max(trial.effect for trial in own)
        moved = f"its output moves by {effect:.2g}"
        if parted:
            still = sum(trial.effect == 0 for trial in own)
            moved = f"outputs of {len(own)} layers move by up to {effect:.2g}{f', {still} not at all' if still else ''}"
        differences = [trial.difference for trial in own if trial.difference is not None]
        beside = f"; diffusers differs from ours by {max(differences):.2g}" if differences else ""
        yield f"{COMPONENT_LABELS[component]}: {moved}{beside}"


def _faults(adapter: Adapter, weights: Weights) -> Iterator[str]:
    """What is wrong with single layers."""
    for place, why in misfits(adapter, weights):
        yield f"{place}: {why}"
    for place, module in adapter.modules.items():
        if not module.is_finite:
            yield f"{place}: holds numbers that are not finite"
        if module.is_dora and module.tensors["dora_scale"].shape[0] != 1:
            yield f"{place}: has DoRA magnitudes by outputs, which UIs compute otherwise; bake it into the base"


def _fault_of(trial: LayerCheck) -> str:
    if not isfinite(trial.effect):
        return f"{trial.name}: with the adapter its output is not finite"
    return (
        f"diffusers: its {trial.name} is {trial.difference:.2g} off, where the adapter moves it by {trial.effect:.2g}"
    )
