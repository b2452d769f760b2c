"""Every base × layers × kind of adapter, with and without text encoders: train two steps, export, and read the file.

SD 1, SD 2 and SDXL are tiny models with random weights; the embedded base is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import CHECKOUT
from tiny import tiny_base

from scumble.configs.options import Data, Model, Network, Objective
from scumble.datasets.reading.folder import Example, read_set
from scumble.datasets.reading.images import Crop, Size, center_crop, read_size
from scumble.trainer.adapters.adapter import read_adapter
from scumble.trainer.adapters.module import Module
from scumble.trainer.adapters.targets import Part
from scumble.trainer.base_model.detect import EMBEDDED, detect_base
from scumble.trainer.base_model.latents import Latents, encode_set
from scumble.trainer.base_model.load import PIPELINES, Base, Pipeline, load
from scumble.trainer.training.export import export
from scumble.trainer.training.lora import AdaptedLayer, attach, component_of
from scumble.trainer.training.objective import Objectives, Sample
from scumble.trainer.training.optimizers import make_optimizer, param_groups

SAMPLES = CHECKOUT / "datasets/samples/clay-style"
NETWORKS = {
    "lora": Network(),
    "rslora": Network(rslora=True),
    "dora": Network(algorithm="dora"),
    "loha": Network(algorithm="loha"),
    "lokr": Network(algorithm="lokr", lokr_factor=4),
}
CASES = [("sketch", True), *((base, text) for base in ("sd1", "sd2", "sdxl") for text in (True, False))]
LAYERS = {"attention": ("attention", 0), "full": ("full", 0), "convs": ("full", 3)}  # targets, convolution rank


@dataclass
class Stage:
    """A base with two encoded images, shared by its tests. `stock` is a diffusers pipeline that loads the files."""

    kind: str
    base: Base
    stock: Pipeline
    examples: list[Example]
    crops: list[list[Crop]]
    latents: Latents


@pytest.fixture(scope="module")
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    kind = request.param
    folder = EMBEDDED if kind == "sketch" else tiny_base(kind, tmp_path_factory.mktemp(kind))
    model = Model(base="sketch" if kind == "sketch" else str(folder))
    base = load(model, detect_base(model), torch.device("cpu"), torch.float32)
    stock = PIPELINES[base.family.name].from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    examples = read_set(SAMPLES).examples[:2]
    crops = [[center_crop(read_size(example.image), Size(64, 64))] for example in examples]
    latents = encode_set(base, [(e.image, c) for e, c in zip(examples, crops, strict=True)])
    return Stage(kind, base, stock, examples, crops, latents)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(("stage", "text"), CASES, indirect=["stage"], scope="module")
def test_the_exported_file_has_the_same_effect_as_the_live_adapter(
    stage: Stage, layers: str, network: str, text: bool, tmp_path: Path
):
    targets, conv_rank = LAYERS[layers]
    texts = ["text", "text2"][: len(stage.base.text_encoders)] if text else []
    parts = [Part("unet", 4, 8.0, conv_rank, 2.0), *(Part(name, 2, 1.0) for name in texts)]
    trained = attach(stage.base, NETWORKS[network].model_copy(update={"targets": targets}), parts, seed=0)
    try:
        train(stage, trained, parts)
        path = tmp_path / "it.safetensors"
        export(path, trained, {}, torch.float32)
        adapter = read_adapter(path)
        assert list(adapter.modules) == sorted(module.module_path for module in trained)
        assert adapter.family == stage.base.family.name or not text  # tiny widths do not identify a family
        assert {module.part for module in trained} == {"unet", *texts}
        changed = 0
        for module in trained:
            changed += compare(module, adapter.modules[module.module_path])
        assert changed > 0.9 * len(trained)  # a short caption may leave some layers without gradient
        if network in ("lora", "rslora") and layers == "convs":  # test_lora.py covers the other layers
            live = rendered(stage.base.pipeline)
            stage.stock.load_lora_weights(str(path))
            np.testing.assert_allclose(rendered(stage.stock), live, atol=2e-4)
    finally:
        remove(stage, trained)


def train(stage: Stage, trained: Sequence[AdaptedLayer], parts: Sequence[Part]) -> None:
    """Two AdamW steps on the real loss: the first changes the factors that start at 0, the second all others too."""
    objectives = Objectives(
        stage.base, stage.examples, stage.crops, stage.latents, Data(caption_dropout=0.0), Objective(), seed=1,
        text_is_trained=len(parts) > 1,
    )  # fmt: skip
    groups = [
        (1e-2, [p for module in trained if module.part == part.name for p in module.tensors.values()]) for part in parts
    ]
    optimizer = make_optimizer("adamw", param_groups(groups), 0.0)
    for step in range(2):
        objectives.losses([Sample(0, step, 0), Sample(1, step, 1)]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def compare(module: AdaptedLayer, read: Module) -> bool:
    """Compare the file's weights to the live layer on random inputs; return whether training changed the layer."""
    original = module.layer.get_base_layer()
    assert isinstance(original, torch.nn.Linear | torch.nn.Conv2d) and isinstance(module.layer, torch.nn.Module)
    weight = original.weight + read.delta().view(original.weight.shape)
    if "dora_scale" in read.tensors:
        weight = decomposed_by_uis(weight, read.tensors["dora_scale"])
    inputs = torch.randn(2, weight.shape[1], *([5, 5] if weight.dim() == 4 else []))
    if isinstance(original, torch.nn.Conv2d):
        expected = torch.nn.functional.conv2d(inputs, weight, original.bias, original.stride, original.padding)
    else:
        expected = torch.nn.functional.linear(inputs, weight, original.bias)
    torch.testing.assert_close(module.layer(inputs), expected, rtol=1e-4, atol=1e-5, msg=lambda m: f"{module.key}: {m}")
    return not torch.equal(weight, original.weight)


def decomposed_by_uis(changed: torch.Tensor, dora_scale: torch.Tensor) -> torch.Tensor:
    """DoRA as in ComfyUI (`weight_decompose`) and A1111 (`apply_weight_decompose`); `changed` is W + dW.

    ComfyUI treats magnitudes as per-output if their first dimension equals that of the weight, which the assertion
    excludes. It also adds an epsilon to the norm, which is negligible in fp32.
    """
    assert dora_scale.shape[0] != changed.shape[0]
    by_input = changed.transpose(0, 1).reshape(changed.shape[1], -1)
    norm = by_input.norm(dim=1, keepdim=True).reshape(changed.shape[1], *[1] * (changed.dim() - 1)).transpose(0, 1)
    return changed * (dora_scale / (norm + torch.finfo(changed.dtype).eps))


@torch.no_grad()
def rendered(pipeline: Pipeline) -> np.ndarray:
    return pipeline(
        "a cat", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="np",
        height=64, width=64,
    ).images[0]  # fmt: skip


def remove(stage: Stage, trained: Sequence[AdaptedLayer]) -> None:
    """Remove the adapters from the base and from `stock`."""
    stage.stock.unload_lora_weights()
    for module in trained:
        component_of(stage.base, module.part).set_submodule(module.path, module.layer.get_base_layer())
    for component in (stage.base.unet, *stage.base.text_encoders):
        component.__dict__.pop("peft_config", None)
