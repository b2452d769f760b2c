"""Does an adapter file work: every key has a home in every UI, every number and shape is right, diffusers agrees.

The proof by diffusers: what the base computes after `load_lora_weights` must be what it computes with our dW added.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from scumble.configs.errors import Refused
from scumble.configs.options import Model

from ..models import Base, load, recognise
from .adapter import Adapter, Module, from_tensors
from .files import read_tensors
from .inspect import FAMILY_LABELS, is_finite
from .keys import Place
from .layout import Shape, layout_of
from .uis import Match, matches

SHARE_OF_EFFECT = 0.01  # a difference beyond this share of what the adapter does is a fault, not rounding
SHARE_OF_OUTPUT = 1e-5  # fp32's own noise
LATENT_CELLS = 16  # sides of the noise that the UNet is tried on


@dataclass(frozen=True)
class Trial:
    """One component with our dW and with diffusers': largest difference between the two, and the adapter's effect.

    `size` is the largest number of the output itself.
    """

    component: str
    difference: float
    effect: float
    size: float

    @property
    def agrees(self) -> bool:
        return self.difference <= max(SHARE_OF_EFFECT * self.effect, SHARE_OF_OUTPUT * self.size)


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a file's numbers and shapes, a line each in `faults`; the UIs' shares and diffusers' trials.

    `dialect` is how its keys are named, kohya or peft.
    """

    uis: tuple[Match, ...]
    trials: tuple[Trial, ...]
    faults: tuple[str, ...]
    dialect: str

    @property
    def is_sound(self) -> bool:
        return not self.faults and all(match.is_whole for match in self.uis)


def verify(file: Path, base: str, quick: bool = False) -> Verdict:
    """Check `file` for a base (as in `--base`); `quick` leaves out diffusers' trial, so that nothing is loaded.

    Raises `Refused` where the file is no adapter or the base is none.
    """
    tensors, metadata = read_tensors(file)
    adapter = from_tensors(tensors, metadata, str(file))
    model = Model(base=base)
    source = recognise(model)
    if adapter.family != source.family.name:
        labels = FAMILY_LABELS[adapter.family], FAMILY_LABELS[source.family.name]
        raise Refused(f"{file}: is for {labels[0]}, but --base {base} is {labels[1]}; name a base of its kind")
    layout = layout_of(Path(source.place), source.is_file)
    uis = tuple(matches(tensors, layout, adapter.family))
    faults = list(_module_faults(adapter, layout))
    loads = not faults and all(match.is_whole for match in uis if match.ui == "diffusers")
    trials: tuple[Trial, ...] = ()
    if loads and not quick:
        trials = tuple(tried(load(model, source, torch.device("cpu"), torch.float32), adapter, file))
        faults += [
            f"diffusers: its {trial.component} is {trial.difference:.2g} off, where the adapter moves it by "
            f"{trial.effect:.2g}"
            for trial in trials
            if not trial.agrees
        ]
    return Verdict(uis, trials, tuple(faults), adapter.dialect)


def _module_faults(adapter: Adapter, layout: Mapping[Place, Shape]) -> Iterator[str]:
    for place, module in adapter.modules.items():
        name = f"{place.component}.{place.path}"
        if place not in layout:
            yield f"{name}: the base has no such layer"
            continue
        if not is_finite(module):
            yield f"{name}: holds numbers that are not finite"
        found, wanted = matrix_shape(module), matrix_of(layout[place])
        if found != wanted:
            yield f"{name}: is {_times(found)} and the layer {_times(wanted)}"


def matrix_shape(module: Module) -> tuple[int, int] | None:
    """(out, in · h · w) of a module's dW; None where its factors do not fit each other."""
    if module.kind == "lora" and "lora_mid" not in module.tensors:
        up, down = module.tensors["lora_up"].flatten(1), module.tensors["lora_down"].flatten(1)
        return (up.shape[0], down.shape[1]) if up.shape[1] == down.shape[0] else None
    try:
        rows, columns = module.delta().shape
    except RuntimeError:
        return None
    return rows, columns


def matrix_of(shape: Shape) -> tuple[int, int]:
    """(out, in, h, w) -> (out, in · h · w)."""
    return shape[0], torch.Size(shape[1:]).numel()


@torch.no_grad()
def tried(base: Base, adapter: Adapter, file: Path) -> Iterator[Trial]:
    """Each adapted component's output three times: alone, with our dW, and as diffusers loads the file."""
    components = sorted({place.component for place in adapter.modules})
    alone = {component: _output(base, component) for component in components}
    weights = {place: _weight(base, place) for place in adapter.modules}
    own = {place: weight.clone() for place, weight in weights.items()}
    for place, module in adapter.modules.items():
        weights[place] += module.delta().reshape(weights[place].shape)
    ours = {component: _output(base, component) for component in components}
    for place, weight in weights.items():
        weight.copy_(own[place])
    base.pipeline.load_lora_weights(str(file))
    theirs = {component: _output(base, component) for component in components}
    base.pipeline.unload_lora_weights()
    for component in components:
        yield Trial(
            component,
            float((theirs[component] - ours[component]).abs().max()),
            float((ours[component] - alone[component]).abs().max()),
            float(alone[component].abs().max()),
        )


def _output(base: Base, component: str) -> torch.Tensor:
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


def _weight(base: Base, place: Place) -> torch.Tensor:
    """The layer's weight; in front of a text encoder's path transformers may have `text_model.`."""
    component = base.unet if place.component == "unet" else base.text_encoders[place.component == "text2"]
    parameters = dict(component.named_parameters())
    path = f"{place.path}.weight"
    return parameters[path] if path in parameters else parameters[f"text_model.{path}"]


def _times(shape: tuple[int, int] | None) -> str:
    return f"{shape[0]} × {shape[1]}" if shape else "of factors that do not fit each other"
