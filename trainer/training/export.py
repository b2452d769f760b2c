"""Export the live adapter to the file that every UI loads: tensors with kohya's names, alphas and metadata."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from scumble.configs.options import Network, Options
from scumble.datasets.reading.folder import Example
from scumble.datasets.reading.images import Size

from ..adapters.adapter import Adapter, to_tensors
from ..adapters.base_tags import NETWORK_MODULES, detection
from ..adapters.files import read_tensors, write_adapter
from ..adapters.module import Module
from ..adapters.targets import Part
from ..base_model.load import Base
from .lora import AdaptedLayer

MAX_TAGS = 500
PRECISIONS = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class TrainingProgress:
    """The progress of training when a file is written; `started` is in seconds since 1970."""

    epoch: int
    step: int
    num_epochs: int
    num_steps: int
    started: float


def module_of(layer: AdaptedLayer) -> Module:
    """A live layer as a module of the file.

    UIs use scale 1 for a LoKr whose two factors are both full matrices, so its scale is multiplied into `lokr_w1`.
    """
    tensors = {slot: parameter.detach() for slot, parameter in layer.tensors.items()}
    if "lokr_w1" in tensors and "lokr_w2" in tensors:
        return Module("lokr", tensors | {"lokr_w1": layer.scale * tensors["lokr_w1"]}, None)
    return Module(layer.kind, tensors, layer.scale * layer.rank)


def tensors_of(layers: Sequence[AdaptedLayer], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The file's tensors in kohya's format: factors in `dtype`, alphas (0-dim) and the magnitudes of DoRA in fp32.

    Magnitudes are few, and training changes them by little relative to their size.
    """
    adapter = Adapter({layer.module_path: module_of(layer) for layer in layers}, family=layers[0].family)
    return {
        name: tensor.cpu() if name.endswith((".alpha", ".dora_scale")) else tensor.to("cpu", dtype)
        for name, tensor in to_tensors(adapter).items()
    }


def export(
    path: Path,
    layers: Sequence[AdaptedLayer],
    metadata: dict[str, str],
    dtype: torch.dtype,
) -> None:
    """Write the adapter, read the file back and compare every tensor with the live adapter.

    Raises `RuntimeError` if they differ.
    """
    expected = tensors_of(layers, dtype)
    write_adapter(expected, metadata, path)
    found, _ = read_tensors(path)
    differing = [name for name in expected if name not in found or not torch.equal(found[name], expected[name])]
    if differing or found.keys() != expected.keys():
        raise RuntimeError(f"{path}: differs from the adapter that was written: {differing[:3]}")


def metadata_of(
    base: Base, options: Options, parts: Sequence[Part], examples: Sequence[Example], buckets: Sequence[Size],
    progress: TrainingProgress,
) -> dict[str, str]:  # fmt: skip
    """The metadata of kohya and ModelSpec, all strings, without any path or user name."""
    v = base.source.prediction == "v_prediction"
    resolution = options.data.resolution  # a number by now, settled by the plan
    unet = next((part for part in parts if part.name == "unet"), parts[0])
    finished = time.time()
    trained_on = [example for example in examples if not example.is_regularization and not example.is_held_out]
    entries: dict[str, object] = {
        **detection(base.family.name, v),
        "modelspec.title": options.output.output_name,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(finished)),
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if v else "epsilon",
        "ss_output_name": options.output.output_name,
        "ss_sd_model_name": Path(base.source.name).name,
        "ss_clip_skip": "None",
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_num_train_images": sum(example.repeats for example in trained_on),
        "ss_num_reg_images": sum(example.repeats for example in examples if example.is_regularization),
        "ss_num_epochs": progress.num_epochs,
        "ss_epoch": progress.epoch,
        "ss_steps": progress.step,
        "ss_max_train_steps": progress.num_steps,
        "ss_training_started_at": progress.started,
        "ss_training_finished_at": finished,
        "ss_tag_frequency": json.dumps(tag_frequency(trained_on)),
        "ss_dataset_dirs": json.dumps(folders(trained_on)),
        "ss_bucket_info": json.dumps({"buckets": bucket_info(buckets)}),
        "ss_network_module": NETWORK_MODULES.get(options.network.algorithm, NETWORK_MODULES["lora"]),
        "ss_network_dim": unet.rank,
        "ss_network_alpha": unet.alpha,
        "ss_network_args": json.dumps(network_arguments(options.network, unet)),
        "ss_unet_lr": options.optimization.learning_rate,
        "ss_text_encoder_lr": options.optimization.text_encoder_lr,
        "ss_learning_rate": options.optimization.learning_rate,
        "ss_optimizer": options.optimization.optimizer,
        "ss_lr_scheduler": options.optimization.lr_scheduler,
        "ss_mixed_precision": PRECISIONS[base.unet.dtype],
        "ss_seed": options.output.seed,
        "ss_noise_offset": options.objective.noise_offset,
        "ss_min_snr_gamma": options.objective.min_snr_gamma
        if options.objective.loss_weighting == "min_snr"
        else "None",
        "ss_training_comment": "trained with scumble",
    }
    if options.data.trigger:
        entries["modelspec.trigger_phrase"] = options.data.trigger
    return {name: str(value) for name, value in entries.items()}


def network_arguments(network: Network, part: Part) -> dict[str, object]:
    """The entries of `ss_network_args`, without rank and alpha, by the names of kohya and LyCORIS."""
    arguments: dict[str, object] = {}
    if network.algorithm in ("loha", "lokr"):
        arguments["algo"] = network.algorithm
    if network.algorithm == "lokr":
        arguments["factor"] = -1 if network.lokr_factor == "auto" else network.lokr_factor
    if network.algorithm == "dora":
        arguments["dora_wd"] = True
    if part.conv_rank:
        arguments |= {"conv_dim": part.conv_rank, "conv_alpha": part.conv_alpha}
    if network.rslora:
        arguments["rslora"] = True
    return arguments


def tag_frequency(examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    """`{folder: {tag: count}}` of the most frequent tags only, to keep the header small."""
    counts: dict[str, Counter[str]] = {}
    for example in examples:
        tags = (tag.strip() for tag in example.caption.split(","))
        counts.setdefault(folder_label(example.image.parent), Counter()).update(tag for tag in tags if tag)
    return {folder: dict(counter.most_common(MAX_TAGS)) for folder, counter in counts.items()}


def folders(examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    """`{folder: {n_repeats, img_count}}`."""
    found: dict[str, dict[str, int]] = {}
    for example in examples:
        entry = found.setdefault(folder_label(example.image.parent), {"n_repeats": example.repeats, "img_count": 0})
        entry["img_count"] += 1
    return found


def folder_label(folder: Path) -> str:
    """The name of a folder in the metadata; `images` for a home folder, whose name is that of the user."""
    folder = folder.resolve()
    return "images" if folder == Path.home().resolve() else folder.name


def bucket_info(buckets: Sequence[Size]) -> dict[str, dict[str, object]]:
    """`{index: {resolution, count}}`."""
    counts = Counter(buckets)
    return {
        str(index): {"resolution": [size.width, size.height], "count": count}
        for index, (size, count) in enumerate(counts.items())
    }
