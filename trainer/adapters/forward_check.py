"""An adapter tried on its base: is what comes of it, as diffusers loads it, what comes of our dW?

Where the base fits into memory, each component computes as a whole, from its input to its output. Otherwise each
adapted layer computes alone: its weight is read from the base, it hears noise, and diffusers' loader has put PEFT's
factors on it in a base that is hollow. Both are fp32 on the CPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path

import psutil
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from scumble.configs.progress import tracked

from ..base_model.detect import DetectedBase
from ..base_model.load import Base
from ..base_model.without_weights import base_without_weights
from ..system.formatting import format_bytes
from .adapter import Adapter
from .applied import applied
from .keys import ModulePath
from .module import Module
from .weights import Weights

SHARE_OF_EFFECT = 0.01  # a difference beyond this share of what the adapter does is a fault, not rounding
SHARE_OF_OUTPUT = 1e-5  # fp32's own noise
LATENT_CELLS = 16  # sides of the noise that the UNet is tried on
LAYER_INPUTS, LAYER_CELLS = 8, 4  # what one layer is tried on: so many vectors, or a map of so many cells a side
ROOM = 1.5  # memory that loading and computing take, by what the weights take themselves
COMPONENTS = {"unet": "unet", "text": "text_encoder", "text2": "text_encoder_2"}  # attributes of a pipeline


@dataclass(frozen=True)
class LayerCheck:
    """A component, or one `layer` of it, alone, with our dW, and with diffusers': how far our dW moves its output, and
    diffusers' from ours.

    `difference` is None where diffusers cannot read the adapter; `size` is the largest number of the output itself.
    """

    component: str
    layer: str  # empty for the component as a whole
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

    @property
    def name(self) -> str:
        return f"{self.component}.{self.layer}" if self.layer else self.component


def too_large(weights: Weights, adapter: Adapter) -> str:
    """Why the base cannot be tried as a whole in what memory is free, or nothing."""
    values = sum(prod(spot.shape) for spot in weights.spots.values())
    kept = sum(prod(weights.spots[place].shape) for place in adapter.modules)  # to be given back
    needed, free = ROOM * 4 * (values + kept), psutil.virtual_memory().available
    return (
        f"the whole base would take up to {format_bytes(needed)} of memory, {format_bytes(free)} are free"
        if needed > free
        else ""
    )


@torch.no_grad()
def checked_forward(base: Base, adapter: Adapter, file: Path | None) -> Iterator[LayerCheck]:
    """Each adapted component's output alone, with our dW, and as diffusers loads `file`, where there is one."""
    components = sorted({place.component for place in adapter.modules})
    alone = {component: output_of(base, component) for component in components}
    with applied(base, adapter):
        ours = {component: output_of(base, component) for component in components}
    theirs = {}
    if file:
        base.pipeline.load_lora_weights(str(file))
        theirs = {component: output_of(base, component) for component in components}
        base.pipeline.unload_lora_weights()
    for component in components:
        yield _compared(component, "", alone[component], ours[component], theirs.get(component))


@torch.no_grad()
def checked_by_layer(
    source: DetectedBase, weights: Weights, adapter: Adapter, file: Path | None
) -> Iterator[LayerCheck]:
    """Each adapted layer's output alone, with our dW, and as diffusers loads `file`, where there is one.

    Layers that only diffusers puts something on are among them; there our dW is 0.
    """
    pipeline = base_without_weights(source)
    if file:
        pipeline.load_lora_weights(str(file))
    layers = {
        ModulePath(component, path.removeprefix("text_model.")): layer
        for component, attribute in COMPONENTS.items() if hasattr(pipeline, attribute)
        for path, layer in getattr(pipeline, attribute).named_modules()
    }  # fmt: skip
    adapted = {place for place, layer in layers.items() if isinstance(layer, BaseTunerLayer)} | set(adapter.modules)
    for place in tracked(sorted(adapted), "trying layers", len(adapted)):
        yield _tried_layer(place, layers[place], adapter.modules.get(place), weights.read(place).float(), bool(file))


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


def _tried_layer(
    place: ModulePath, layer: torch.nn.Module, module: Module | None, weight: torch.Tensor, with_theirs: bool
) -> LayerCheck:
    """One layer of a hollow base on noise; `weight` is its own, in fp32, and it is hollow again afterwards."""
    own = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    assert isinstance(own, torch.nn.Linear | torch.nn.Conv2d)
    empty, weight = own.weight, weight.reshape(own.weight.shape)
    shape = (
        (LAYER_INPUTS, own.in_features)
        if isinstance(own, torch.nn.Linear)
        else (1, own.in_channels, LAYER_CELLS, LAYER_CELLS)
    )
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    own.weight = torch.nn.Parameter(weight, requires_grad=False)
    alone = own(noise)
    theirs = layer(noise) if with_theirs else None
    if module:
        own.weight = torch.nn.Parameter(module.on(weight), requires_grad=False)
    ours = own(noise)
    own.weight = empty
    return _compared(place.component, place.path, alone, ours, theirs)


def _compared(
    component: str, layer: str, alone: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor | None
) -> LayerCheck:
    effect, size = float((ours - alone).abs().max()), float(alone.abs().max())
    return LayerCheck(component, layer, effect, None if theirs is None else float((theirs - ours).abs().max()), size)
