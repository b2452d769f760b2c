"""Check that a base gives the same outputs with our dW applied as with the adapter loaded by diffusers.

If the base fits into memory, each component runs as a whole. Otherwise each adapted layer runs on its own with noise as
input: diffusers loads the adapter into a base without weights, and each layer's weight is read from disk. Both run in
fp32 on the CPU.
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

EFFECT_TOLERANCE = 0.01  # relative to the adapter's effect; a larger difference is a fault, not rounding
OUTPUT_TOLERANCE = 1e-5  # relative to the output; fp32 rounding noise
LATENT_SIZE = 16  # side of the noise latents for the UNet
LAYER_INPUTS, LAYER_SIZE = 8, 4  # input of a single layer: number of vectors, or side of the feature map
MEMORY_FACTOR = 1.5  # memory for loading and running, relative to the weights
COMPONENTS = {"unet": "unet", "text": "text_encoder", "text2": "text_encoder_2"}  # pipeline attributes


@dataclass(frozen=True)
class LayerCheck:
    """The result for a component, or for one `layer` of it.

    `effect` is the largest change of the output by our dW, `difference` the largest distance between diffusers' output
    and ours (None if diffusers cannot load the adapter), `size` the largest absolute value of the base's output.
    """

    component: str
    layer: str  # empty for the whole component
    effect: float
    difference: float | None
    size: float

    @property
    def agrees(self) -> bool:
        if not isfinite(self.effect):
            return False
        return self.difference is None or self.difference <= max(
            EFFECT_TOLERANCE * self.effect, OUTPUT_TOLERANCE * self.size
        )

    @property
    def name(self) -> str:
        return f"{self.component}.{self.layer}" if self.layer else self.component


def too_large(weights: Weights, adapter: Adapter) -> str:
    """Return why the whole base cannot be checked in the free memory, or an empty string."""
    values = sum(prod(stored.shape) for stored in weights.layers.values())
    backup = sum(prod(weights.layers[layer].shape) for layer in adapter.modules)  # `applied` keeps the original weights
    needed, free = MEMORY_FACTOR * 4 * (values + backup), psutil.virtual_memory().available
    return (
        f"the whole base needs up to {format_bytes(needed)} of memory, but only {format_bytes(free)} are free"
        if needed > free
        else ""
    )


@torch.no_grad()
def checked_forward(base: Base, adapter: Adapter, file: Path | None) -> Iterator[LayerCheck]:
    """Check each adapted component: the base's output, with our dW, and with `file` (if any) loaded by diffusers."""
    components = sorted({layer.component for layer in adapter.modules})
    originals = {component: output_of(base, component) for component in components}
    with applied(base, adapter):
        ours = {component: output_of(base, component) for component in components}
    theirs = {}
    if file:
        base.pipeline.load_lora_weights(str(file))
        theirs = {component: output_of(base, component) for component in components}
        base.pipeline.unload_lora_weights()
    for component in components:
        yield _compared(component, "", originals[component], ours[component], theirs.get(component))


@torch.no_grad()
def checked_by_layer(
    source: DetectedBase, weights: Weights, adapter: Adapter, file: Path | None
) -> Iterator[LayerCheck]:
    """Check each adapted layer: the base's output, with our dW, and with `file` (if any) loaded by diffusers.

    This includes layers that only diffusers modifies; there our dW is 0.
    """
    pipeline = base_without_weights(source)
    if file:
        pipeline.load_lora_weights(str(file))
    modules = {
        ModulePath(component, path.removeprefix("text_model.")): module
        for component, attribute in COMPONENTS.items() if hasattr(pipeline, attribute)
        for path, module in getattr(pipeline, attribute).named_modules()
    }  # fmt: skip
    adapted = {layer for layer, module in modules.items() if isinstance(module, BaseTunerLayer)} | set(adapter.modules)
    for layer in tracked(sorted(adapted), "checking layers", len(adapted)):
        yield _checked_layer(layer, modules[layer], adapter.modules.get(layer), weights.read(layer).float(), bool(file))


def output_of(base: Base, component: str) -> torch.Tensor:
    """Return a component's output for fixed noise or tokens. The UNet gets random text embeddings."""
    generator = torch.Generator().manual_seed(0)
    if component != "unet":
        encoder = base.text_encoders[["text", "text2"].index(component)]
        tokens = torch.randint(0, encoder.config.vocab_size, (1, 16), generator=generator)
        return encoder(tokens, output_hidden_states=True).hidden_states[-1]
    config = base.unet.config
    noise = torch.randn(1, config["in_channels"], LATENT_SIZE, LATENT_SIZE, generator=generator)
    embeddings = torch.randn(1, 16, config["cross_attention_dim"], generator=generator)
    added = {}
    if config["addition_embed_type"] == "text_time":
        ids = torch.full((1, 6), 64.0)
        width = config["projection_class_embeddings_input_dim"] - ids.numel() * config["addition_time_embed_dim"]
        added = {"text_embeds": torch.randn(1, width, generator=generator), "time_ids": ids}
    return base.unet(noise, torch.tensor(500), embeddings, added_cond_kwargs=added).sample


def _checked_layer(
    layer: ModulePath, target: torch.nn.Module, module: Module | None, weight: torch.Tensor, with_theirs: bool
) -> LayerCheck:
    """Check one layer of a base without weights on noise. `weight` (fp32) is set only during the check."""
    base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    assert isinstance(base_layer, torch.nn.Linear | torch.nn.Conv2d)
    empty, weight = base_layer.weight, weight.reshape(base_layer.weight.shape)
    shape = (
        (LAYER_INPUTS, base_layer.in_features)
        if isinstance(base_layer, torch.nn.Linear)
        else (1, base_layer.in_channels, LAYER_SIZE, LAYER_SIZE)
    )
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    base_layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    original = base_layer(noise)
    theirs = target(noise) if with_theirs else None
    if module:
        base_layer.weight = torch.nn.Parameter(module.on(weight), requires_grad=False)
    ours = base_layer(noise)
    base_layer.weight = empty
    return _compared(layer.component, layer.path, original, ours, theirs)


def _compared(
    component: str, layer: str, original: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor | None
) -> LayerCheck:
    effect, size = float((ours - original).abs().max()), float(original.abs().max())
    return LayerCheck(component, layer, effect, None if theirs is None else float((theirs - ours).abs().max()), size)
