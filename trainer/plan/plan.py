"""What a run will do, decided before a weight is loaded: every "auto" becomes a number, and each has its reason."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from scumble.configs.errors import Refused
from scumble.configs.options import Options

from ..adapters.targets import Part
from ..base_model.detect import Source
from ..training.optimizers import KINDS
from .training_set import resolution_of


@dataclass(frozen=True)
class Defaults:
    """What suits a base: samples are pictures seen in the whole run, for each picture of the set."""

    batch: int
    rank: int
    text_rank: dict[str, int]
    rate: float
    text_rate: float
    samples_per_picture: dict[str, int]
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


KINDS_OF_ADAPTER = {  # name, what to know of its file, and its best rate against LoRA's (tests/benchmarks/rates.py)
    "lora": ("LoRA", "", 1.0),
    "dora": (
        "DoRA",
        "its file is exact in ComfyUI, A1111 and InvokeAI; diffusers warns and leaves its magnitudes out",
        1.0,
    ),
    "loha": ("LoHa", "its file loads in ComfyUI, A1111 and Forge; diffusers cannot read it", 4.0),
    "lokr": ("LoKr", "its file loads in ComfyUI, A1111 and Forge; diffusers cannot read it", 8.0),
}


@dataclass(frozen=True)
class Plan:
    """Numbers of a run. A step is one update of the adapter; an epoch is one pass over pictures times repeats."""

    parts: list[Part]
    rates: dict[str, float]
    resolution_px: int
    batch: int
    steps_per_epoch: int
    num_steps: int
    num_epochs: int
    preview_every: int
    save_every: int
    schedule: str
    reasons: list[str]


def defaults_for(source: Source) -> Defaults:
    """By the base's family, or those of the embedded base."""
    return DEFAULTS["sketch" if source.name == "sketch" else source.family.name]


def batch_of(options: Options, source: Source) -> int:
    return defaults_for(source).batch if options.optimization.batch == "auto" else options.optimization.batch


def parts_of(options: Options, source: Source) -> list[Part]:
    """The parts that are trained, with rank and alpha. Raises `Refused` where the kind of adapter cannot do it."""
    network, defaults = options.network, defaults_for(source)
    if network.network in ("loha", "lokr"):
        if network.dropout:
            raise Refused(f"--dropout {network.dropout:g}: --network {network.network} has none; lora and dora do")
        if network.rslora:
            raise Refused(f"--rslora: --network {network.network} has no such scale; leave it, or take lora or dora")
    rank = defaults.rank if network.rank == "auto" else network.rank
    conv_alpha = network.conv_rank if network.conv_alpha == "auto" else network.conv_alpha
    parts = [Part("unet", rank, rank if network.alpha == "auto" else network.alpha, network.conv_rank, conv_alpha)]
    asked = [("text", network.text_rank, network.text_alpha), ("text2", network.text2_rank, network.text2_alpha)]
    for name, wanted, alpha in asked[: len(source.family.text_prefixes)]:
        text_rank = defaults.text_rank[options.data.kind] if wanted == "auto" else wanted
        if text_rank:
            parts.append(Part(name, text_rank, text_rank if alpha == "auto" else alpha))
    if len(source.family.text_prefixes) == 1 and network.text2_rank not in ("auto", 0):
        raise Refused(f"--text2-rank {network.text2_rank}: {source.family.label} has one text encoder; use --text-rank")
    return parts


def make_plan(options: Options, source: Source, batches_per_epoch: int, num_pictures: int, num_samples: int) -> Plan:
    """The plan for a set of `num_pictures`, `num_samples` with repeats, in `batches_per_epoch` forward passes."""
    wanted, defaults = options.optimization, defaults_for(source)
    parts = parts_of(options, source)
    steps_per_epoch = ceil(batches_per_epoch / wanted.accumulate)
    name, note, times = KINDS_OF_ADAPTER[options.network.network]
    reasons = [f"{name} on {_words_for_parts(parts, options)}", *([f"{name}: {note}"] if note else [])]
    low, high = options.objective.min_timestep, options.objective.max_timestep
    if low > high:
        raise Refused(f"--min-timestep {low}: above --max-timestep {high}, so no timestep is left to train")
    if wanted.steps != "auto" and wanted.epochs != "auto":
        raise Refused(f"--steps {wanted.steps} and --epochs {wanted.epochs}: give one of them")
    if wanted.steps != "auto":
        num_steps = wanted.steps
        reasons.append(f"{num_steps} steps as asked")
    elif wanted.epochs != "auto":
        num_steps = wanted.epochs * steps_per_epoch
        reasons.append(f"{num_steps} steps: {wanted.epochs} epochs as asked")
    else:
        samples = num_pictures * defaults.samples_per_picture[options.data.kind]
        samples = min(max(samples, defaults.fewest_samples), defaults.most_samples)
        num_steps = max(1, round(samples / num_samples)) * steps_per_epoch
        reasons.append(
            f"{num_steps} steps: a {options.data.kind} of {num_pictures} pictures on {source.label} wants about "
            f"{samples} looks, {samples // num_pictures} at each"
        )
    num_epochs = ceil(num_steps / steps_per_epoch)
    tenth = ceil(num_epochs / 10)  # rather a divisor near it, so that the last two rows of previews are not alike
    tenth = next((every for every in range(tenth, 2 * tenth) if num_epochs % every == 0), tenth) * steps_per_epoch
    kind = KINDS[wanted.optimizer]
    own_rates = [1.0 if kind.finds_rate else own * kind.rate * times for own in (defaults.rate, defaults.text_rate)]
    rate, text_rate = (
        own if asked == "auto" else asked for own, asked in zip(own_rates, (wanted.rate, wanted.text_rate), strict=True)
    )
    if kind.finds_rate and wanted.text_rate == "auto":
        text_rate = rate
    schedule = kind.schedule if wanted.schedule == "auto" else wanted.schedule
    rates = {"unet": rate, "text": text_rate, "text2": text_rate if wanted.text2_rate == "auto" else wanted.text2_rate}
    if kind.finds_rate and len({rates[part.name] for part in parts}) > 1:
        raise Refused(f"--text-rate {text_rate:g}: {wanted.optimizer} takes one rate for all parts; give --rate alone")
    shown = {part.name: rates[part.name] for part in parts}
    found = " times what it finds" if kind.finds_rate else ""
    reasons.append(
        f"{wanted.optimizer}, {schedule} rate of "
        + ", ".join(f"{value:g}{found} ({name})" for name, value in shown.items())
    )
    if times != 1 and not kind.finds_rate and "auto" in (wanted.rate, wanted.text_rate):
        reasons.append(f"the rate is {times:g} times LoRA's, at which {name} learns as fast")
    return Plan(
        parts=parts,
        rates=rates,
        resolution_px=resolution_of(options, source),
        batch=batch_of(options, source),
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        num_epochs=num_epochs,
        preview_every=tenth if options.output.preview_every == "auto" else options.output.preview_every,
        schedule=schedule,
        save_every=tenth if options.output.save_every == "auto" else options.output.save_every,
        reasons=reasons,
    )


def settled(options: Options, plan: Plan, name: str) -> Options:
    """The options with every number that the plan chose, as they are written next to the result."""
    ranks = {part.name: part for part in plan.parts}

    def rank_of(part: str) -> int:
        return ranks[part].rank if part in ranks else 0

    network = options.network.model_copy(
        update={
            "rank": ranks["unet"].rank, "alpha": ranks["unet"].alpha, "conv_alpha": ranks["unet"].conv_alpha or "auto",
            "text_rank": rank_of("text"), "text2_rank": rank_of("text2"),
            "text_alpha": ranks["text"].alpha if "text" in ranks else "auto",
            "text2_alpha": ranks["text2"].alpha if "text2" in ranks else "auto",
        }
    )  # fmt: skip
    optimization = options.optimization.model_copy(
        update={"rate": plan.rates["unet"], "text_rate": plan.rates["text"], "text2_rate": plan.rates["text2"],
                "schedule": plan.schedule, "batch": plan.batch, "steps": plan.num_steps, "epochs": "auto"}
    )  # fmt: skip
    output = options.output.model_copy(
        update={"name": name, "preview_every": plan.preview_every, "save_every": plan.save_every}
    )
    data = options.data.model_copy(
        update={
            "resolution": plan.resolution_px,
            "images": placed(options.data.images),
            "prior": placed(options.data.prior),
        }
    )
    model = options.model.model_copy(update={"base": placed(options.model.base), "vae": placed(options.model.vae)})
    return options.model_copy(
        update={"network": network, "optimization": optimization, "output": output, "data": data, "model": model}
    )


def placed(path: str) -> str:
    """A path that holds from any folder; what is no path (a hub id, sketch, nothing) stays."""
    return str(Path(path).absolute()) if path and path != "sketch" and Path(path).exists() else path


def _words_for_parts(parts: Sequence[Part], options: Options) -> str:
    words = {"unet": f"UNet ({options.network.targets})", "text": "text encoder", "text2": "second text encoder"}
    said = [f"{words[part.name]} rank {part.rank}" + (f", convs rank {part.conv_rank}" if part.conv_rank else "")
            for part in parts]  # fmt: skip
    return ", ".join(said)
