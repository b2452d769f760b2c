"""Does an adapter file work: every key has a home in every UI, every number and shape is right, diffusers agrees.

The proof by diffusers: what the base computes after `load_lora_weights` must be what it computes with our dW added.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch

from scumble.configs.errors import Refused
from scumble.configs.options import Model

from ..models import Base, load, recognise
from .adapter import Adapter, from_tensors, read_named
from .fit import misfits
from .inspect import FAMILY_LABELS, beyond_diffusers, is_finite, network_of, poor_uis
from .uis import Match, matches
from .wear import worn
from .weights import Weights, find_weights

SHARE_OF_EFFECT = 0.01  # a difference beyond this share of what the adapter does is a fault, not rounding
SHARE_OF_OUTPUT = 1e-5  # fp32's own noise
LATENT_CELLS = 16  # sides of the noise that the UNet is tried on


@dataclass(frozen=True)
class Trial:
    """One component alone, with our dW, and with diffusers': how far our dW moves its output, and diffusers' from ours.

    `difference` is None where diffusers cannot read the adapter; `size` is the largest number of the output itself.
    """

    component: str
    effect: float
    difference: float | None
    size: float

    @property
    def agrees(self) -> bool:
        if not isfinite(self.effect):
            return False
        return self.difference is None or self.difference <= max(
            SHARE_OF_EFFECT * self.effect, SHARE_OF_OUTPUT * self.size
        )


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a file's layers and results, a line each in `faults`; the UIs' shares, the trials on the base.

    `poor` are the UIs that do not read it whole; `beyond_diffusers` says why diffusers cannot do what it says, and
    `untried` why it was not tried there, or nothing; `dialect` is how its keys are named, kohya or peft.
    """

    uis: tuple[Match, ...]
    poor: tuple[str, ...]
    beyond_diffusers: str
    trials: tuple[Trial, ...]
    untried: str
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
    source = recognise(model)
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
    trials: tuple[Trial, ...] = ()
    if not faults and not quick:
        loaded = load(model, source, torch.device("cpu"), torch.float32)
        trials = tuple(tried(loaded, adapter, None if untried else file))
        faults += [_fault_of(trial) for trial in trials if not trial.agrees]
    return Verdict(uis, poor, foreign, trials, untried, tuple(faults), adapter.dialect)


def _faults(adapter: Adapter, weights: Weights) -> Iterator[str]:
    """What is wrong with single layers."""
    for place, why in misfits(adapter, weights):
        yield f"{place.component}.{place.path}: {why}"
    for place, module in adapter.modules.items():
        name = f"{place.component}.{place.path}"
        if not is_finite(module):
            yield f"{name}: holds numbers that are not finite"
        if module.is_dora and module.tensors["dora_scale"].shape[0] != 1:
            yield f"{name}: has DoRA magnitudes by outputs, which UIs compute otherwise; bake it into the base"


def _fault_of(trial: Trial) -> str:
    if not isfinite(trial.effect):
        return f"{trial.component}: with the adapter its output is not finite"
    return (
        f"diffusers: its {trial.component} is {trial.difference:.2g} off, where the adapter moves it by "
        f"{trial.effect:.2g}"
    )


@torch.no_grad()
def tried(base: Base, adapter: Adapter, file: Path | None) -> Iterator[Trial]:
    """Each adapted component's output alone, with our dW, and as diffusers loads `file`, where there is one."""
    components = sorted({place.component for place in adapter.modules})
    alone = {component: output_of(base, component) for component in components}
    with worn(base, adapter):
        ours = {component: output_of(base, component) for component in components}
    theirs = {}
    if file:
        base.pipeline.load_lora_weights(str(file))
        theirs = {component: output_of(base, component) for component in components}
        base.pipeline.unload_lora_weights()
    for component in components:
        yield Trial(
            component,
            float((ours[component] - alone[component]).abs().max()),
            float((theirs[component] - ours[component]).abs().max()) if file else None,
            float(alone[component].abs().max()),
        )


def output_of(base: Base, component: str) -> torch.Tensor:
    """What a component makes of fixed noise, or of fixed tokens; the UNet hears random text, not the encoders'."""
    generator = torch.Generator().manual_seed(0)
    if component != "unet":
        encoder = base.text_encoders[["text", "text2"].index(component)]
        tokens = torch.randint(0, encoder.config.vocab_size, (1, 16), generator=generator)
        return encoder(tokens, output_hidden_states=True).hidden_states[-1]
    config = base.unet.config
    noise = torch.randn(1, config["in_channels"], LATENT_CELLS, LATENT_CELLS, generator=generator)
    heard = torch.randn(1, 16, config["cross_attention_dim"], generator=generator)
    added = {}
    if config["addition_embed_type"] == "text_time":
        ids = torch.full((1, 6), 64.0)
        width = config["projection_class_embeddings_input_dim"] - ids.numel() * config["addition_time_embed_dim"]
        added = {"text_embeds": torch.randn(1, width, generator=generator), "time_ids": ids}
    return base.unet(noise, torch.tensor(500), heard, added_cond_kwargs=added).sample
