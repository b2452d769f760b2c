"""The plan of a run: every "auto" that decides its numbers is settled before a weight is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from scumble.configs.errors import Refused
from scumble.configs.options import Options
from scumble.configs.words import counted

from ..adapters.targets import Part
from ..base_model.detect import DetectedBase
from ..training.optimizers import OPTIMIZERS
from .training_set import resolution_of

EVERY_EPOCH_UP_TO, ABOUT_ROWS = 16, 12  # previews and checkpoints with "auto"


@dataclass(frozen=True)
class Defaults:
    """What suits a base model. `samples_per_image` is how often each image is seen in the whole run."""

    batch_size: int
    rank: int
    text_encoder_rank: dict[str, int]
    learning_rate: float
    text_encoder_lr: float
    samples_per_image: dict[str, int]
    fewest_samples: int
    most_samples: int


DEFAULTS = {
    "sketch": Defaults(
        4, 16, {"style": 8, "character": 8}, 2e-3, 1e-3, {"style": 32, "character": 32}, 320, 1600
    ),
    "sd1": Defaults(4, 16, {"style": 8, "character": 8}, 1e-4, 5e-5, {"style": 120, "character": 100}, 1500, 8000),
    "sd2": Defaults(4, 16, {"style": 8, "character": 8}, 1e-4, 5e-5, {"style": 120, "character": 100}, 1500, 8000),
    "sdxl": Defaults(
        1, 16, {"style": 0, "character": 8}, 1e-4, 3e-5, {"style": 100, "character": 80}, 1200, 6000
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Algorithm:
    """A kind of adapter: its name, a note on where its file loads, and its best learning rate as a multiple of LoRA's
    (measured: tests/benchmarks/rates.py)."""

    name: str
    note: str = ""
    lr_multiple: float = 1.0


ALGORITHMS = {
    "lora": Algorithm("LoRA"),
    "dora": Algorithm(
        "DoRA", "its file is exact in ComfyUI, A1111 and InvokeAI; diffusers warns and ignores its magnitudes"
    ),
    "loha": Algorithm("LoHa", "its file loads in ComfyUI, A1111 and Forge; diffusers cannot read it", 4.0),
    "lokr": Algorithm("LoKr", "its file loads in ComfyUI, A1111 and Forge; diffusers cannot read it", 8.0),
}


@dataclass(frozen=True)
class Plan:
    """The numbers of a run. A step is one optimizer step; an epoch is one pass over all images times their repeats."""

    parts: list[Part]
    learning_rates: dict[str, float]
    resolution_px: int
    batch_size: int
    steps_per_epoch: int
    num_steps: int
    num_epochs: int
    preview_every: int
    save_every: int
    lr_scheduler: str
    reasons: list[str]


def defaults_for(source: DetectedBase) -> Defaults:
    """The defaults of the base's family, or those of the embedded base."""
    return DEFAULTS["sketch" if source.name == "sketch" else source.family.name]


def batch_size_of(options: Options, source: DetectedBase) -> int:
    """The batch size that was asked for, or the default of the base."""
    asked = options.optimization.batch_size
    return defaults_for(source).batch_size if asked == "auto" else asked


def parts_of(options: Options, source: DetectedBase) -> list[Part]:
    """The parts that are trained, with rank and alpha. Raises `Refused` where the algorithm does not support it."""
    network, defaults = options.network, defaults_for(source)
    if network.algorithm in ("loha", "lokr"):
        if network.lora_dropout:
            raise Refused(
                f"--lora-dropout {network.lora_dropout:g}: not available with --algorithm {network.algorithm}; "
                "use lora or dora"
            )
        if network.rslora:
            raise Refused(f"--rslora: not available with --algorithm {network.algorithm}; use lora or dora")
    rank = defaults.rank if network.rank == "auto" else network.rank
    conv_alpha = network.conv_rank if network.conv_alpha == "auto" else network.conv_alpha
    parts = [Part("unet", rank, rank if network.alpha == "auto" else network.alpha, network.conv_rank, conv_alpha)]
    asked = [
        ("text", network.text_encoder_rank, network.text_encoder_alpha),
        ("text2", network.text_encoder_2_rank, network.text_encoder_2_alpha),
    ]
    for name, wanted, alpha in asked[: len(source.family.text_prefixes)]:
        text_rank = defaults.text_encoder_rank[options.data.kind] if wanted == "auto" else wanted
        if text_rank:
            parts.append(Part(name, text_rank, text_rank if alpha == "auto" else alpha))
    if len(source.family.text_prefixes) == 1 and network.text_encoder_2_rank not in ("auto", 0):
        raise Refused(
            f"--text-encoder-2-rank {network.text_encoder_2_rank}: {source.family.label} has one text encoder; "
            "use --text-encoder-rank"
        )
    return parts


def make_plan(
    options: Options, source: DetectedBase, batches_per_epoch: int, num_images: int, num_samples: int
) -> Plan:
    """The plan for a set of `num_images`: `num_samples` with repeats, in `batches_per_epoch` forward passes."""
    wanted = options.optimization
    parts = parts_of(options, source)
    steps_per_epoch = ceil(batches_per_epoch / wanted.gradient_accumulation_steps)
    algorithm = ALGORITHMS[options.network.algorithm]
    reasons = [f"{algorithm.name} on {_describe_parts(parts, options)}"]
    if algorithm.note:
        reasons.append(f"{algorithm.name}: {algorithm.note}")
    low, high = options.objective.min_timestep, options.objective.max_timestep
    if low > high:
        raise Refused(f"--min-timestep {low}: above --max-timestep {high}, so no timestep is left to train")
    num_steps, reason = _num_steps(options, source, steps_per_epoch, num_images, num_samples)
    reasons.append(reason)
    num_epochs = ceil(num_steps / steps_per_epoch)
    learning_rates, lr_reasons = _learning_rates(options, source, parts)
    lr_scheduler = OPTIMIZERS[wanted.optimizer].lr_scheduler if wanted.lr_scheduler == "auto" else wanted.lr_scheduler
    rates = ", ".join(f"{learning_rates[part.name]:g} ({part.name})" for part in parts)
    found = " times its own estimate" if OPTIMIZERS[wanted.optimizer].is_self_tuning else ""
    reasons.append(f"{wanted.optimizer}, {lr_scheduler}, learning rate {rates}{found}")
    return Plan(
        parts=parts,
        learning_rates=learning_rates,
        resolution_px=resolution_of(options, source),
        batch_size=batch_size_of(options, source),
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        num_epochs=num_epochs,
        preview_every=interval(options.output.preview_every, num_epochs, steps_per_epoch),
        save_every=interval(options.output.save_every, num_epochs, steps_per_epoch),
        lr_scheduler=lr_scheduler,
        reasons=[*reasons, *lr_reasons],
    )


def interval(asked: int | str, num_epochs: int, steps_per_epoch: int) -> int:
    """Steps between previews or checkpoints: `auto` is every epoch up to 16 epochs, else about 12 times at epoch ends.

    Where a divisor of `num_epochs` is near, it is used, so that the last two are not close together.
    """
    if isinstance(asked, int):
        return asked
    if asked == "epoch" or num_epochs <= EVERY_EPOCH_UP_TO:
        return steps_per_epoch
    every = ceil(num_epochs / ABOUT_ROWS)
    return next((near for near in range(every, 2 * every) if num_epochs % near == 0), every) * steps_per_epoch


def settled(options: Options, plan: Plan, name: str) -> Options:
    """The options with every number that the plan chose, as they are written next to the result."""
    ranks = {part.name: part for part in plan.parts}

    def rank_of(part: str) -> int:
        return ranks[part].rank if part in ranks else 0

    network = options.network.model_copy(
        update={
            "rank": ranks["unet"].rank, "alpha": ranks["unet"].alpha, "conv_alpha": ranks["unet"].conv_alpha or "auto",
            "text_encoder_rank": rank_of("text"), "text_encoder_2_rank": rank_of("text2"),
            "text_encoder_alpha": ranks["text"].alpha if "text" in ranks else "auto",
            "text_encoder_2_alpha": ranks["text2"].alpha if "text2" in ranks else "auto",
        }
    )  # fmt: skip
    optimization = options.optimization.model_copy(
        update={
            "learning_rate": plan.learning_rates["unet"], "text_encoder_lr": plan.learning_rates["text"],
            "text_encoder_2_lr": plan.learning_rates["text2"], "lr_scheduler": plan.lr_scheduler,
            "batch_size": plan.batch_size, "steps": plan.num_steps, "epochs": "auto",
        }
    )  # fmt: skip
    output = options.output.model_copy(
        update={"output_name": name, "preview_every": plan.preview_every, "save_every": plan.save_every}
    )
    data = options.data.model_copy(
        update={
            "resolution": plan.resolution_px,
            "images": absolute(options.data.images),
            "regularization_images": absolute(options.data.regularization_images),
        }
    )
    if isinstance(data.validation_split, str) and data.validation_split not in ("off", "auto"):
        data = data.model_copy(update={"validation_split": absolute(data.validation_split)})
    model = options.model.model_copy(update={"base": absolute(options.model.base), "vae": absolute(options.model.vae)})
    return options.model_copy(
        update={"network": network, "optimization": optimization, "output": output, "data": data, "model": model}
    )


def absolute(path: str) -> str:
    """A path that is valid from any folder; what is no path (a hub id, sketch, nothing) is returned unchanged."""
    return str(Path(path).absolute()) if path and path != "sketch" and Path(path).exists() else path


def _num_steps(
    options: Options, source: DetectedBase, steps_per_epoch: int, num_images: int, num_samples: int
) -> tuple[int, str]:
    """The number of optimizer steps, and why."""
    wanted, defaults, kind = options.optimization, defaults_for(source), options.data.kind

    def steps(number: int) -> str:
        return f"{counted(number, 'step')} of batch size {batch_size_of(options, source)}"

    if wanted.steps != "auto" and wanted.epochs != "auto":
        raise Refused(f"--steps {wanted.steps} and --epochs {wanted.epochs}: give only one of them")
    if wanted.steps != "auto":
        return wanted.steps, f"{steps(wanted.steps)} as requested"
    if wanted.epochs != "auto":
        num_steps = wanted.epochs * steps_per_epoch
        return num_steps, f"{steps(num_steps)}: {counted(wanted.epochs, 'epoch')} as requested"
    samples = num_images * defaults.samples_per_image[kind]
    samples = min(max(samples, defaults.fewest_samples), defaults.most_samples)
    num_steps = max(1, round(samples / num_samples)) * steps_per_epoch
    reason = f"{steps(num_steps)}: {counted(num_images, 'image')}, {kind}: about {samples} training samples"
    return num_steps, f"{reason} ({samples // num_images} per image) for {source.label}"


def _learning_rates(
    options: Options, source: DetectedBase, parts: Sequence[Part]
) -> tuple[dict[str, float], list[str]]:
    """The peak learning rate of each part, and what there is to say about them."""
    wanted, defaults = options.optimization, defaults_for(source)
    optimizer, algorithm = OPTIMIZERS[wanted.optimizer], ALGORITHMS[options.network.algorithm]

    def chosen(asked: float | str, default: float) -> float:
        if isinstance(asked, float | int):
            return asked
        return 1.0 if optimizer.is_self_tuning else default * optimizer.lr_multiple * algorithm.lr_multiple

    unet = chosen(wanted.learning_rate, defaults.learning_rate)
    text = chosen(wanted.text_encoder_lr, defaults.text_encoder_lr)
    if optimizer.is_self_tuning and wanted.text_encoder_lr == "auto":
        text = unet
    text_2 = text if wanted.text_encoder_2_lr == "auto" else wanted.text_encoder_2_lr
    rates = {"unet": unet, "text": text, "text2": text_2}
    if optimizer.is_self_tuning and len({rates[part.name] for part in parts}) > 1:
        raise Refused(
            f"--text-encoder-lr {text:g}: {wanted.optimizer} uses one learning rate for all parts; "
            "give only --learning-rate"
        )
    is_multiplied = algorithm.lr_multiple != 1 and not optimizer.is_self_tuning
    if is_multiplied and "auto" in (wanted.learning_rate, wanted.text_encoder_lr):
        reason = f"the learning rate is {algorithm.lr_multiple:g} times LoRA's: {algorithm.name} then learns as fast"
        return rates, [reason]
    return rates, []


def _describe_parts(parts: Sequence[Part], options: Options) -> str:
    labels = {"unet": f"UNet ({options.network.targets})", "text": "text encoder", "text2": "second text encoder"}
    return ", ".join(
        f"{labels[part.name]} rank {part.rank}" + (f", convolutions rank {part.conv_rank}" if part.conv_rank else "")
        for part in parts
    )
