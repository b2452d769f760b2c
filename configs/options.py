"""Every option of scumble, declared once: type, default, range, unit and help.

Command-line flags, TOML keys, `--help` and the reference (`scumble options`) are derived from these declarations.
Names follow diffusers' training scripts, then kohya's. A value of "auto" is chosen by the program from the base, the
images and the machine; the plan of the run gives the reason.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from cyclopts import Group, Parameter
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

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


def _number(value: Any) -> Any:
    """A number that is written as text, as on the command line, as a number; anything else unchanged."""
    for kind in (int, float):
        with suppress(ValueError, TypeError):
            return kind(value) if isinstance(value, str) else value
    return value


ValidationSplit = Annotated[
    Literal["off", "auto"] | Annotated[int, Ge(1), Le(10_000)] | Annotated[float, Gt(0), Lt(1)] | str,
    BeforeValidator(_number),
    "off | auto | a share from above 0 to below 1 | a whole number of images | a folder",
]


def same_as(**names: str) -> AfterValidator:
    """A validator that replaces other names of a value by the one that the program uses."""
    return AfterValidator(lambda value: names.get(value, value) if isinstance(value, str) else value)


IS_FP32 = same_as(no="fp32", float="fp32")


def option(default: Any, help: str, unit: str = "") -> Any:
    """One option; its type carries the range, `unit` follows its value in the reference."""
    return Field(default, description=help, json_schema_extra={"unit": unit} if unit else None)


class Section(BaseModel):
    """A TOML table of options: immutable; unknown keys and non-finite numbers are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class Model(Section):
    """The base model that is adapted."""

    base: str = option("sketch", "Base model: sketch, a diffusers folder, a hub id or a .safetensors file")
    vae: str = option("", "VAE to use instead of the base's own: a folder, a hub id or a .safetensors file")
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = option(
        "auto", "What the base predicts; auto: read from the base"
    )
    zero_terminal_snr: bool | Auto = option("auto", "Train on the noise schedule that ends in pure noise")


class Captions(Section):
    """How captions are turned into training prompts."""

    trigger: str = option("", "Trigger words, added to every caption that lacks them")
    trigger_position: Literal["front", "end"] = option("front", "Where missing trigger words are added")
    caption_prefix: str = option("", 'Text before every caption, trigger included, e.g. "a photo of"')
    caption_suffix: str = option("", 'Text after every caption, e.g. ", on white"')
    caption_lines: Literal["join", "pick"] = option(
        "join", "Captions of several lines: join the lines, or pick one at random each time"
    )
    wildcards: bool = option(True, "Replace {a|b} with one of its choices each time; {{a|b}} keeps the braces")
    shuffle_tags: bool = option(False, "Shuffle comma-separated tags each time")
    keep_tags: CountOrNone = option(1, "Tags at the front that are neither shuffled nor dropped")
    tag_dropout: ShareBelowOne = option(0.0, "Probability that each of the other tags is dropped")
    caption_dropout: Share = option(0.05, "Probability that the whole caption is dropped")


class Data(Captions):
    """Images and captions."""

    images: str = option(
        "", "Folder of images, or a TOML list of folders (the positional argument on the command line)"
    )
    kind: Literal["style", "character"] = option("style", "What the images have in common; sets the defaults")
    resolution: Pixels | Auto = option(
        "auto", "Images are resized to the area of a square with this side; auto: the base's own", "px"
    )
    more_resolutions: tuple[Pixels, ...] = option(
        (), "Further resolutions at which each image is also trained, equally often", "px"
    )
    bucket_reso_steps: Step | Auto = option("auto", "Bucket sides are multiples of this; auto: the base's own", "px")
    min_bucket_reso: PixelsOrNone = option(0, "Shortest side of a bucket; 0: no limit", "px")
    max_bucket_reso: PixelsOrNone = option(0, "Longest side of a bucket; 0: no limit", "px")
    bucket_upscale: bool = option(
        True, "Enlarge images that are smaller than the resolution; off: they get a bucket of their own size"
    )
    crop: Literal["center", "random", "focus", "faces"] = option(
        "center", "What a crop keeps: the center, several random parts, the salient part, or faces (extra [faces])"
    )
    crops: Annotated[int, Ge(1), Le(64)] = option(
        4, "Number of crops per image with crop = random, drawn once from the seed"
    )
    masks: Literal["auto", "alpha", "off"] = option(
        "auto",
        "Where the loss counts: auto: in the masks, if there are mask files; alpha: transparency too; off: everywhere",
    )
    mask_floor: Share = option(0.0, "Loss weight of masked-out areas; the rest has 1")
    repeats: Count = option(1, "How often each image is seen per epoch")
    random_flip: bool = option(False, "Mirror images at random (not for faces, text or asymmetric subjects)")
    latent_cache: str = option(
        "auto", "Folder that keeps latents for the next run; auto: the user's cache folder; off: none"
    )
    validation_split: ValidationSplit = option(
        "off",
        "Images held out to measure validation loss: off, auto (by the size of the set), a share below 1, a count, "
        "or a folder of further images",
    )
    regularization_images: str = option("", "Folder of regularization images (prior preservation)")
    prior_loss_weight: Weight = option(1.0, "Loss weight of regularization images")


class Network(Section):
    """The adapter."""

    algorithm: Literal["lora", "dora", "loha", "lokr"] = option(
        "lora", "Kind of adapter; diffusers loads only lora, the UIs load all four"
    )
    rank: Rank | Auto = option("auto", "Rank on the UNet's layers")
    alpha: Alpha | Auto = option("auto", "The adapter is scaled by alpha / rank; auto: alpha = rank")
    targets: str = option(
        "attention", "Layers of the UNet to train: attention, full (also feed-forward and projections), or a regex"
    )
    conv_rank: RankOrNone = option(0, "Rank on the UNet's convolutions; 0: none")
    conv_alpha: Alpha | Auto = option("auto", "Alpha of the convolutions; auto: their rank")
    text_encoder_rank: RankOrNone | Auto = option("auto", "Rank on the first text encoder; 0: not trained")
    text_encoder_alpha: Alpha | Auto = option("auto", "Alpha of the first text encoder; auto: its rank")
    text_encoder_2_rank: RankOrNone | Auto = option("auto", "Rank on the second text encoder (SDXL); 0: not trained")
    text_encoder_2_alpha: Alpha | Auto = option("auto", "Alpha of the second text encoder; auto: its rank")
    lokr_factor: Annotated[int, Ge(2), Le(64)] | Auto = option(
        8, "Size of LoKr's small factor; auto: near the square root of the layer's size"
    )
    lora_dropout: ShareBelowOne = option(0.0, "Dropout probability of the adapter's inputs (lora, dora)")
    rslora: bool = option(False, "Rank-stabilized scale alpha / sqrt(rank) (Kalajdzievski 2023; lora, dora)")


class Objective(Section):
    """The loss."""

    loss_type: Annotated[Literal["l2", "huber", "mse"], same_as(mse="l2")] = option(
        "l2", "Distance between prediction and target; mse is another name for l2"
    )
    huber_delta: Rate = option(0.1, "Where the huber loss changes from quadratic to linear")
    loss_weighting: Literal["none", "min_snr", "debiased"] = option("min_snr", "Loss weight by timestep")
    min_snr_gamma: Annotated[float, Gt(0), Le(1000)] = option(5.0, "Gamma of min-SNR weighting (Hang et al. 2023)")
    noise_offset: Share = option(0.0, "Strength of a random constant added to each channel of the noise")
    multires_noise_discount: ShareBelowOne = option(
        0.0, "Discount per octave of multi-resolution noise; 0: no such noise"
    )
    input_perturbation: Share = option(0.0, "Extra noise on the UNet's input only (Ning et al. 2023)")
    min_timestep: Timestep = option(0, "First timestep that is trained")
    max_timestep: Timestep = option(999, "Last timestep that is trained")


class Optimization(Section):
    """How the loss is minimized."""

    optimizer: Literal["adamw", "adamw8bit", "lion", "prodigy", "adafactor", "schedule_free"] = option(
        "adamw", "Optimizer; all but adamw and adafactor need the extra [optimizers]"
    )
    learning_rate: Annotated[Rate | Auto, Parameter(alias="--lr")] = option(
        "auto", "Peak learning rate of the UNet's adapter"
    )
    text_encoder_lr: Rate | Auto = option("auto", "Peak learning rate of the text encoders' adapter")
    text_encoder_2_lr: Rate | Auto = option(
        "auto", "Peak learning rate of the second text encoder's adapter; auto: that of the first"
    )
    weight_decay: Weight = option(0.01, "Decoupled weight decay")
    lr_scheduler: Literal[
        "auto", "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "rex"
    ] = option("auto", "Learning-rate schedule; auto: what suits the optimizer")
    lr_num_cycles: Count = option(3, "Number of cycles of cosine_with_restarts")
    lr_warmup_steps: Annotated[float, Ge(0), Le(10_000_000)] = option(
        0.05, "Steps in which the learning rate rises from zero; below 1: a share of the run (not for constant)"
    )
    epochs: Count | Auto = option("auto", "Passes over the images; auto: from steps")
    steps: Count | Auto = option("auto", "Optimizer steps; auto: from the kind and the number of images")
    batch_size: Count | Auto = option("auto", "Images in one forward pass, across all devices")
    gradient_accumulation_steps: Count = option(1, "Forward passes whose gradients are summed for one optimizer step")
    max_grad_norm: Weight = option(1.0, "Gradients are clipped to this norm; 0: not clipped")
    ema_decay: ShareBelowOne = option(
        0.0, "Decay of the moving average of the adapter's weights, which is then what is saved; 0: off"
    )


class Machine(Section):
    """Where and how training is computed."""

    device: Literal["auto", "cuda", "cpu", "mps"] = option("auto", "Device to train on")
    mixed_precision: Annotated[Literal["auto", "bf16", "fp16", "fp32", "no", "float"], IS_FP32] = option(
        "auto", 'Precision of the base; the adapter is always fp32; "no" and "float" mean fp32'
    )
    torch_compile: Literal["auto", "on", "off"] = option(
        "auto", "torch.compile the UNet's blocks; auto: on CUDA, for a long run, if a measured step gets faster"
    )
    base_quantization: Literal["auto", "off", "int8", "nf4"] = option(
        "auto", "Keep the frozen UNet in 8 or 4 bits (QLoRA), slower; auto: only if a step does not fit otherwise"
    )
    attention: Literal["sdpa", "xformers"] = option("sdpa", "Attention kernel; xformers needs the extra [xformers]")
    gradient_checkpointing: bool | Auto = option(
        "auto", "Recompute activations in the backward pass to save memory; auto: only if a step does not fit"
    )


class Previews(Section):
    """How previews are rendered."""

    prompts: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = option(
        (), "Prompts; none: derived from the captions"
    )
    prompt_file: str = option("", "Text file with one prompt per line, # for comments")
    negative_prompt: str = option("", "Negative prompt")
    sampler: Literal["ddim", "euler", "euler_a", "dpmpp_2m"] = option("ddim", "Sampler")
    num_inference_steps: Annotated[int, Ge(1), Le(1000)] = option(25, "Sampler steps")
    guidance_scale: Annotated[float, Ge(1), Le(50)] | Auto = option(
        "auto", "Classifier-free guidance scale (CFG); 1: no guidance"
    )
    preview_size: Pixels | Auto = option("auto", "Side of a square preview; auto: the resolution", "px")
    preview_share: Share = option(
        1.0, "Largest share of the run time for previews; further ones are skipped, except the first and the last"
    )
    preview_seed: Seed = option(1, "Seed of the first prompt; each further prompt adds 1")


class Output(Section):
    """What is saved, and how often."""

    output_name: str = option("", "Name of the run and of the adapter file; default: the name of the image folder")
    output_dir: str = option("runs", "Folder in which the run's own folder is created")
    preview_every: CountOrNone | Auto | Literal["epoch"] = option(
        "auto",
        "Steps between previews; auto: every epoch up to 16 epochs, else about 12 times at the end of an epoch; "
        "epoch: every epoch; 0: none",
        "steps",
    )
    save_every: CountOrNone | Auto | Literal["epoch"] = option(
        "auto",
        "Steps between saved checkpoints; auto: every epoch up to 16 epochs, else about 12 times at the end of an "
        "epoch; epoch: every epoch; 0: only the last",
        "steps",
    )
    keep_checkpoints: Literal["all", "last", "best"] = option(
        "all",
        "Checkpoints that stay on the disk: all, the last, or those with the lowest loss (validation loss if images "
        "are held out)",
    )
    keep_count: Count = option(3, "Number of checkpoints to keep with keep_checkpoints = last or best")
    save_precision: Annotated[Literal["fp16", "bf16", "fp32", "float"], IS_FP32] = option(
        "fp16", 'Number format of the adapter file; "float" means fp32'
    )
    seed: Seed = option(0, "Random seed")


TITLES = "Model", "Data", "Network", "Objective", "Optimization", "Machine", "Previews", "Output"
"""Sections in the order of `--help`."""


def section(title: str) -> Parameter:
    """Flags are the option's name alone; `--help` groups them under the section's title."""
    order = TITLES.index(title) if title in TITLES else len(TITLES)
    return Parameter(name="*", group=Group(title, sort_key=order), negative_iterable=())


class Options(Section):
    """All options by TOML table. Keys are unique across tables, so the flag is the key alone."""

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
    """One option as people see it: its table, key, allowed values, default, unit and help."""

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
    """The values that a type accepts, in words: `a whole number from 1 to 1024, or auto`."""
    if get_origin(kind) is Annotated:
        kind, *limits = get_args(kind)
    if in_words := [limit for limit in limits if isinstance(limit, str)]:
        return in_words[0]
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
