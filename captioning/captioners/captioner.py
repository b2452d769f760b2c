"""The captioners by name: each is given pictures and says a sentence, or tags, of each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from scumble.configs.errors import Refused

from .checkpoint import check_packages
from .filename import Filename
from .picture import Picture
from .request import Request
from .wording import MAX_TOKENS, asked


class Captioner(Protocol):
    """Says something of each picture, in their order; nothing is an empty text."""

    def captions(self, pictures: Sequence[Picture]) -> list[str]: ...


@dataclass(frozen=True)
class CaptionerInfo:
    """One captioner: how it is made, its usual model, and which flags are for it.

    `sees` says that it looks at pixels; `says_tags` that its words are tags, not sentences that need cleaning.
    """

    make: Callable[[Request], Captioner]
    model: str = ""
    takes: frozenset[str] = frozenset()
    packages: tuple[str, ...] = ()
    batch: int = 8
    sees: bool = True
    says_tags: bool = False


def _blip(request: Request) -> Captioner:
    from .blip import Blip
    from .device import place

    return Blip(request.model, *place(request.device, request.precision), request.prompt, request.max_tokens)


def _florence(request: Request) -> Captioner:
    from .device import place
    from .florence import TASKS, Florence

    task = request.prompt or TASKS[request.detail]
    return Florence(request.model, *place(request.device, request.precision), task, request.max_tokens)


def _vlm(request: Request) -> Captioner:
    from .device import place
    from .vlm import Vlm

    prompt = request.prompt or asked(request.subject, request.detail, request.trigger)
    return Vlm(request.model, *place(request.device, request.precision), prompt, request.max_tokens)


def _tagger(request: Request) -> Captioner:
    from .tagger import Rules, Tagger

    rules = Rules(
        request.threshold, request.character_threshold, request.categories, request.keep_underscores, request.subject
    )
    return Tagger(request.model, request.device, rules)


NEURAL = frozenset({"model", "device", "precision", "prompt", "max_tokens"})

CAPTIONERS = {
    "filename": CaptionerInfo(lambda request: Filename(), batch=256, sees=False, says_tags=True),
    "blip": CaptionerInfo(_blip, "Salesforce/blip-image-captioning-large", NEURAL, batch=8),
    "florence2": CaptionerInfo(_florence, "florence-community/Florence-2-large", NEURAL | {"detail"}, batch=8),
    "vlm": CaptionerInfo(_vlm, "Qwen/Qwen3-VL-4B-Instruct", NEURAL | {"detail"}, batch=4),
    "wd-tagger": CaptionerInfo(
        _tagger, "SmilingWolf/wd-eva02-large-tagger-v3",
        frozenset({"model", "device", "threshold", "character_threshold", "categories", "keep_underscores"}),
        packages=("onnxruntime",), batch=8, says_tags=True,
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
    """The request with the captioner's defaults; of `given`, what is not None was asked for.

    Raises `Refused` for a flag that this captioner does not take.
    """
    kind = CAPTIONERS[captioner]
    values: dict[str, Any] = {**DEFAULTS, "model": kind.model}
    for name, value in given.items():
        if value is None:
            continue
        if name not in kind.takes:
            takers = ", ".join(other for other, one in CAPTIONERS.items() if name in one.takes)
            flag = "--" + name.replace("_", "-")
            raise Refused(f"{flag}: not for --captioner {captioner}; {takers} take{'s' * (', ' not in takers)} it")
        values[name] = value
    values.setdefault("max_tokens", MAX_TOKENS[values["detail"]])
    return Request(captioner=captioner, **values, **common)


def make_captioner(request: Request) -> Captioner:
    """The captioner, loaded. Raises `Refused` where a package or the model is not to be had."""
    kind = CAPTIONERS[request.captioner]
    check_packages(request.captioner, kind.packages)
    return kind.make(request)
