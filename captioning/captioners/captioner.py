"""The table of captioners: each turns images into a sentence or tags per image."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from scumble.configs.errors import Refused

from .checkpoint import check_packages
from .filename import Filename
from .picture import ImageFile
from .request import Request
from .wording import MAX_TOKENS, build_prompt


class Captioner(Protocol):
    """Returns one text per image, in order; empty if it has no caption for an image."""

    def captions(self, images: Sequence[ImageFile]) -> list[str]: ...


@dataclass(frozen=True)
class CaptionerInfo:
    """A captioner: its factory, default model, accepted flags, required packages and default batch size.

    `reads_pixels` is False for captioners that only use the file name. `returns_tags` is True for captioners that
    return tags; sentences are cleaned up instead.
    """

    make: Callable[[Request], Captioner]
    model: str = ""
    flags: frozenset[str] = frozenset()
    packages: tuple[str, ...] = ()
    batch: int = 8
    reads_pixels: bool = True
    returns_tags: bool = False


def _blip(request: Request) -> Captioner:
    from .blip import Blip
    from .device import device_and_dtype

    return Blip(request.model, *device_and_dtype(request.device, request.precision), request.prompt, request.max_tokens)


def _florence(request: Request) -> Captioner:
    from .device import device_and_dtype
    from .florence import TASKS, Florence

    task = request.prompt or TASKS[request.detail]
    return Florence(request.model, *device_and_dtype(request.device, request.precision), task, request.max_tokens)


def _vlm(request: Request) -> Captioner:
    from .device import device_and_dtype
    from .vlm import Vlm

    prompt = request.prompt or build_prompt(request.subject, request.detail, request.trigger)
    return Vlm(request.model, *device_and_dtype(request.device, request.precision), prompt, request.max_tokens)


def _tagger(request: Request) -> Captioner:
    from .tagger import Tagger, TagRules

    rules = TagRules(
        request.threshold, request.character_threshold, request.categories, request.keep_underscores, request.subject
    )
    return Tagger(request.model, request.device, rules)


NEURAL_FLAGS = frozenset({"model", "device", "precision", "prompt", "max_tokens"})

CAPTIONERS = {
    "filename": CaptionerInfo(lambda request: Filename(), batch=256, reads_pixels=False, returns_tags=True),
    "blip": CaptionerInfo(_blip, "Salesforce/blip-image-captioning-large", NEURAL_FLAGS, batch=8),
    "florence2": CaptionerInfo(_florence, "florence-community/Florence-2-large", NEURAL_FLAGS | {"detail"}, batch=8),
    "vlm": CaptionerInfo(_vlm, "Qwen/Qwen3-VL-4B-Instruct", NEURAL_FLAGS | {"detail"}, batch=4),
    "wd-tagger": CaptionerInfo(
        _tagger, "SmilingWolf/wd-eva02-large-tagger-v3",
        frozenset({"model", "device", "threshold", "character_threshold", "categories", "keep_underscores"}),
        packages=("onnxruntime",), batch=8, returns_tags=True,
    ),
}  # fmt: skip

DEFAULTS: Mapping[str, Any] = {
    "detail": "medium",
    "prompt": "",
    "device": "auto",
    "precision": "auto",
    "threshold": 0.35,
    "character_threshold": 0.85,
    "categories": ("general",),
    "keep_underscores": False,
}


def request_for(captioner: str, given: Mapping[str, Any], **common: Any) -> Request:
    """Build a request from the flags in `given`; flags that are None take the captioner's defaults.

    Raises `Refused` for a flag that this captioner does not accept.
    """
    info = CAPTIONERS[captioner]
    values: dict[str, Any] = {**DEFAULTS, "model": info.model}
    for name, value in given.items():
        if value is None:
            continue
        if name not in info.flags:
            supported = ", ".join(other for other, one in CAPTIONERS.items() if name in one.flags)
            flag = "--" + name.replace("_", "-")
            raise Refused(f"{flag}: not available with --captioner {captioner}, only with {supported}")
        values[name] = value
    values.setdefault("max_tokens", MAX_TOKENS[values["detail"]])
    return Request(captioner=captioner, **values, **common)


def make_captioner(request: Request) -> Captioner:
    """Load a captioner. Raises `Refused` if a package or the model is not available."""
    info = CAPTIONERS[request.captioner]
    check_packages(request.captioner, info.packages)
    return info.make(request)
