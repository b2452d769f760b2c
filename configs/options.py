"""Every option of scumble, once: type, default, range, unit and help in one line each.

Command-line flags, TOML keys, `--help` and the reference (`scumble options`) derive from these lines.
A value of "auto" is chosen by the program from the base, the pictures and the machine, and the run says why.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
Rank = Annotated[int, Ge(1), Le(1024)]
RankOrNone = Annotated[int, Ge(0), Le(1024)]
Alpha = Annotated[float, Gt(0), Le(4096)]
Pixels = Annotated[int, Ge(64), Le(4096)]
PixelsOrNone = Annotated[int, Ge(0), Le(8192)]
Step = Annotated[int, Ge(8), Le(512)]
Count = Annotated[int, Ge(1), Le(10_000_000)]
CountOrNone = Annotated[int, Ge(0), Le(10_000_000)]
Timestep = Annotated[int, Ge(0), Le(999)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
Rate = Annotated[float, Gt(0), Le(100)]
Share = Annotated[float, Ge(0), Le(1)]
ShareBelowOne = Annotated[float, Ge(0), Lt(1)]
Weight = Annotated[float, Ge(0), Le(100)]


def option(default: Any, help: str, unit: str = "") -> Any:
    """One option; its type carries the range, `unit` stands behind its value in the reference."""
    return Field(default, description=help, json_schema_extra={"unit": unit} if unit else None)


class Section(BaseModel):
    """A TOML table of options: unknown keys and non-finite numbers are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class Model(Section):
    """What is adapted."""

    base: str = option("sketch", "Base model: sketch, a diffusers folder, a hub id or a .safetensors file")
    vae: str = option("", "VAE to use instead of the base's own: a folder, a hub id or a .safetensors file")
    prediction: Literal["auto", "epsilon", "v_prediction"] = option("auto", "What the base predicts")
    zero_terminal_snr: bool | Auto = option("auto", "Train on the schedule that ends in pure noise")


class Captions(Section):
    """What training hears of the captions."""

    trigger: str = option("", "Words that call the adapter, put before every caption that lacks them")
    prefix: str = option("", 'Words before every caption, trigger and all, as "a photo of"')
    suffix: str = option("", 'Words after every caption, as ", on white"')
    caption_lines: Literal["join", "pick"] = option(
        "join", "A caption of several lines: join them, or pick one of them each time"
    )
    wildcards: bool = option(True, "Say one of {a|b} each time; {{a|b}} says the braces themselves")
    shuffle_tags: bool = option(False, "Put comma-separated tags in random order each time")
    keep_tags: CountOrNone = option(1, "Tags at the front that are neither shuffled nor dropped")
    tag_dropout: ShareBelowOne = option(0.0, "Share of the other tags that is left out each time")
    caption_dropout: Share = option(0.05, "Share of steps whose caption is empty")


class Data(Captions):
    """Pictures and captions."""

    images: str = option("", "Folder of pictures, or a TOML list of folders; needs no flag")
    kind: Literal["style", "character"] = option("style", "What the pictures have in common; sets the defaults")
    resolution: Pixels | Auto = option(
        "auto", "Side of a square with the area that pictures are brought to; auto: the base's own", "px"
    )
    more_resolutions: tuple[Pixels, ...] = option(
        (), "Further resolutions at which each picture is seen as well, as often", "px"
    )
    bucket_step: Step | Auto = option("auto", "Step of the sides of buckets; auto: the base's own", "px")
    min_side: PixelsOrNone = option(0, "Shortest side of a bucket; 0: no limit", "px")
    max_side: PixelsOrNone = option(0, "Longest side of a bucket; 0: no limit", "px")
    upscale: bool = option(True, "Enlarge pictures smaller than the resolution; else they get a bucket of their size")
    crop: Literal["centre", "random", "focus", "faces"] = option(
        "centre", "Which part stays: the middle, several at random, what stands out, or faces (extra [faces])"
    )
    crops: Annotated[int, Ge(1), Le(64)] = option(
        4, "Crops of each picture with crop = random, drawn once from the seed"
    )
    masks: Literal["auto", "alpha", "off"] = option(
        "auto", "Parts that count: auto: mask files where there are some; alpha: also transparency; off: all"
    )
    mask_floor: Share = option(0.0, "Weight of what a mask hides, beside 1 for what it shows")
    repeats: Count = option(1, "Times that each picture is seen in one epoch")
    flip: bool = option(False, "Mirror pictures at random (not for faces, letters, or one-sided things)")
    cache: str = option("auto", "Folder that keeps latents for the next run; auto: the user's cache folder; off: none")
    validation_split: ShareBelowOne = option(
        0.0, "Share of the pictures held out: never trained on, their loss is measured with each saved adapter"
    )
    prior: str = option("", "Folder of regularisation pictures (prior preservation)")
    prior_weight: Weight = option(1.0, "Weight of the loss on regularisation pictures")


class Network(Section):
    """The adapter."""

    network: Literal["lora", "dora", "loha", "lokr"] = option(
        "lora", "Kind of adapter; all but lora are for the UIs alone, diffusers cannot read them"
    )
    rank: Rank | Auto = option("auto", "Rank on the UNet's attention")
    alpha: Alpha | Auto = option("auto", "Scale is alpha / rank; auto: alpha = rank")
    targets: str = option("attention", "UNet layers: attention, full (with feed-forward and projections), or a regex")
    conv_rank: RankOrNone = option(0, "Rank on the UNet's convolutions; 0: none")
    conv_alpha: Alpha | Auto = option("auto", "Alpha of the convolutions; auto: their rank")
    text_rank: RankOrNone | Auto = option("auto", "Rank on the first text encoder; 0: not trained")
    text_alpha: Alpha | Auto = option("auto", "Alpha of the first text encoder; auto: its rank")
    text2_rank: RankOrNone | Auto = option("auto", "Rank on the second text encoder (SDXL); 0: not trained")
    text2_alpha: Alpha | Auto = option("auto", "Alpha of the second text encoder; auto: its rank")
    lokr_factor: Annotated[int, Ge(2), Le(64)] | Auto = option(
        8, "Size of LoKr's small factor; auto: near the square root of the layer's"
    )
    dropout: ShareBelowOne = option(0.0, "Share of the adapter's inputs dropped in each step (lora, dora)")
    rslora: bool = option(False, "Rank-stabilised scale alpha / sqrt(rank) (Kalajdzievski 2023; lora, dora)")


class Objective(Section):
    """What is minimised."""

    loss: Literal["mse", "huber"] = option("mse", "Distance between prediction and target")
    huber_delta: Rate = option(0.1, "Where the huber loss turns from square to straight")
    weighting: Literal["none", "min_snr", "debiased"] = option("min_snr", "Weight of each timestep")
    min_snr_gamma: Annotated[float, Gt(0), Le(1000)] = option(5.0, "Gamma of min-SNR weighting (Hang et al. 2023)")
    noise_offset: Share = option(0.0, "Strength of a constant added to each channel's noise")
    multires_noise: ShareBelowOne = option(0.0, "Share kept per octave of multi-resolution noise; 0: off")
    input_perturbation: Share = option(0.0, "Extra noise on the input alone (Ning et al. 2023)")
    min_timestep: Timestep = option(0, "First timestep that is trained")
    max_timestep: Timestep = option(999, "Last timestep that is trained")


class Optimization(Section):
    """How it is minimised."""

    optimizer: Literal["adamw", "adamw8bit", "lion", "prodigy", "adafactor", "schedule_free"] = option(
        "adamw", "Optimiser; all but adamw and adafactor need the extra [optimizers]"
    )
    rate: Rate | Auto = option("auto", "Learning rate of the UNet's adapter")
    text_rate: Rate | Auto = option("auto", "Learning rate of the text encoders' adapter")
    text2_rate: Rate | Auto = option("auto", "Learning rate of the second text encoder; auto: text_rate")
    weight_decay: Weight = option(0.01, "Decoupled weight decay")
    schedule: Literal["auto", "constant", "cosine", "linear", "cosine_restarts", "rex"] = option(
        "auto", "Shape of the learning rate over the run; auto: what suits the optimiser"
    )
    restarts: Count = option(3, "Cycles of cosine_restarts")
    warm_up: ShareBelowOne = option(0.05, "Share of the run in which the rate rises from zero")
    epochs: Count | Auto = option("auto", "Passes over the pictures; auto: from steps")
    steps: Count | Auto = option("auto", "Optimiser steps; auto: from the kind and the number of pictures")
    batch: Count | Auto = option("auto", "Pictures in one forward pass")
    accumulate: Count = option(1, "Forward passes summed into one optimiser step")
    clip: Weight = option(1.0, "Largest norm of the whole gradient; 0: not clipped")
    ema: ShareBelowOne = option(0.0, "Decay of a moving average of the adapter, which is then what is saved; 0: off")


class Machine(Section):
    """Where and how it is computed."""

    device: Literal["auto", "cuda", "cpu", "mps"] = option("auto", "Where to train")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option("auto", "Of the base; the adapter is always fp32")
    compile: Literal["auto", "on", "off"] = option(
        "auto", "torch.compile the UNet's blocks; auto: on CUDA, in a long run, if a measured step is faster for it"
    )
    quantize: Literal["auto", "off", "int8", "nf4"] = option(
        "auto", "Frozen UNet in 8 or 4 bits (QLoRA), slower; auto: only if a step does not fit otherwise"
    )
    attention: Literal["sdpa", "xformers"] = option("sdpa", "Attention kernel; xformers needs the extra [xformers]")
    checkpointing: bool | Auto = option(
        "auto", "Recompute activations to save memory; auto: only if a step does not fit"
    )


class Previews(Section):
    """How previews are painted."""

    prompts: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = option(
        (), "Prompts; none: derived from the captions"
    )
    prompt_file: str = option("", "Text file with one prompt a line, # for remarks")
    negative: str = option("", "Negative prompt")
    sampler: Literal["ddim", "euler", "euler_a", "dpmpp_2m"] = option("ddim", "Sampler")
    preview_steps: Annotated[int, Ge(1), Le(1000)] = option(25, "Sampler steps")
    cfg: Annotated[float, Ge(1), Le(50)] | Auto = option("auto", "Classifier-free guidance scale; 1: none")
    preview_size: Pixels | Auto = option("auto", "Side of the square preview; auto: the resolution", "px")
    preview_share: Share = option(
        1.0, "Largest share of the run's time that previews take; those above it are left out, but for first and last"
    )
    preview_seed: Seed = option(1, "Seed of the first prompt; each prompt has the next")


class Output(Section):
    """What is kept, and how often."""

    name: str = option("", "Name of the run and the file; default: the folder's name")
    runs: str = option("runs", "Folder in which the run's own folder is made")
    preview_every: CountOrNone | Auto = option("auto", "Steps between previews; auto: each epoch; 0: none", "steps")
    save_every: CountOrNone | Auto = option(
        "auto", "Steps between saved adapters; auto: each epoch; 0: only the last", "steps"
    )
    keep: Literal["all", "last", "best"] = option(
        "all",
        "Saved adapters that stay: all, the last, or the best by loss, on held-out pictures if there are some",
    )
    keep_count: Count = option(3, "How many stay with keep = last or best")
    save_dtype: Literal["fp16", "bf16", "fp32"] = option("fp16", "Number format of the adapter file")
    seed: Seed = option(0, "Of every random choice")


def section(title: str) -> Parameter:
    """Flags carry the option's name alone, and `--help` shows them under the section's title."""
    return Parameter(name="*", group=title, negative_iterable=())


class Options(Section):
    """All options, by TOML table; a key stands in one table only, so its name alone makes the flag."""

    model: Annotated[Model, section("Model")] = Model()
    data: Annotated[Data, section("Data")] = Data()
    network: Annotated[Network, section("Network")] = Network()
    objective: Annotated[Objective, section("Objective")] = Objective()
    optimization: Annotated[Optimization, section("Optimization")] = Optimization()
    machine: Annotated[Machine, section("Machine")] = Machine()
    previews: Annotated[Previews, section("Previews")] = Previews()
    output: Annotated[Output, section("Output")] = Output()


@dataclass(frozen=True)
class Declared:
    """One option as people see it: where it stands, how it is typed, what it takes."""

    table: str
    key: str
    allowed: str
    default: Any
    unit: str
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.key.replace("_", "-")


def declared() -> Iterator[Declared]:
    """Every option in the order of declaration."""
    for table, field in Options.model_fields.items():
        kind = field.annotation
        assert isinstance(kind, type) and issubclass(kind, Section)
        for key, entry in kind.model_fields.items():
            extra = entry.json_schema_extra
            unit = str(extra.get("unit", "")) if isinstance(extra, dict) else ""
            yield Declared(
                table,
                key,
                allowed(entry.annotation, entry.metadata),
                entry.default,
                unit,
                entry.description or "",
            )


def allowed(kind: Any, limits: Iterable[Any] = ()) -> str:
    """What a type takes, in words: `a whole number from 1 to 1024, or auto`."""
    if get_origin(kind) is Annotated:
        kind, *limits = get_args(kind)
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return ", or ".join(allowed(part) for part in get_args(kind))
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        return "a list of " + ("texts" if inner is str else allowed(inner).replace("a whole number", "whole numbers"))
    words = {bool: "true | false", int: "a whole number", float: "a number", str: "text"}[kind]
    if kind in (int, float):
        for limit in limits:
            match limit:
                case Ge(ge=low):
                    words += f" from {low}"
                case Gt(gt=low):
                    words += f" above {low}"
                case Le(le=high):
                    words += f" to {high}"
                case Lt(lt=high):
                    words += f" to below {high}"
    return words
