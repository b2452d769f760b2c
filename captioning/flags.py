"""The flags of `scumble caption` that determine the caption text, and the captioning request built from them."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from scumble.configs.errors import Refused

from .captioners.request import Category, Detail, Device, Precision, Request, SubjectKind


@dataclass(frozen=True)
class CaptionFlags:
    """One field per flag; None selects the captioner's default."""

    captioner: Annotated[
        Literal["filename", "blip", "florence2", "vlm", "wd-tagger"],
        Parameter(
            help="filename: words of the file name; blip: one short sentence; florence2: sentences; vlm: any "
            "image-text-to-text model, e.g. Qwen-VL; wd-tagger: tags, for drawings"
        ),
    ] = "filename"
    kind: Annotated[
        SubjectKind, Parameter(help="Subject of the images: captions leave out the style, or the character's identity")
    ] = "style"
    model: Annotated[str | None, Parameter(help="Folder or hub id of the model; each captioner has a default")] = None
    detail: Annotated[Detail | None, Parameter(help="Length of the captions; CLIP reads about 50 words")] = None
    prompt: Annotated[
        str | None, Parameter(help="Prompt for the model, instead of the template; blip continues the text")
    ] = None
    max_tokens: Annotated[int | None, Parameter(help="Maximum number of tokens per caption")] = None
    threshold: Annotated[float | None, Parameter(help="Minimum probability of a tag; default: 0.35")] = None
    character_threshold: Annotated[
        float | None, Parameter(help="Minimum probability of a character name; default: 0.85")
    ] = None
    categories: Annotated[
        tuple[Category, ...] | None,
        Parameter(help="Tag categories to include; default: general", consume_multiple=True, negative=""),
    ] = None
    keep_underscores: Annotated[
        bool, Parameter(help="Keep the underscores in tags; otherwise only emoticons like ^_^ keep them", negative="")
    ] = False
    trigger: Annotated[
        str, Parameter(help="Trigger words of the adapter; `scumble train --trigger` also adds them to captions")
    ] = ""
    trigger_position: Annotated[
        Literal["front", "end", "none"],
        Parameter(help="Where the trigger words are written; none: only the prompt template uses them"),
    ] = "front"
    drop: Annotated[
        tuple[str, ...] | None,
        Parameter(help="Words and tags to remove from captions", consume_multiple=True, negative=""),
    ] = None

    def request(self, device: Device | None, precision: Precision | None) -> Request:
        """The captioning request. Raises `Refused` for a value out of range or a flag the captioner does not accept."""
        from .captioners.captioner import request_for

        if self.max_tokens is not None and self.max_tokens < 1:
            raise Refused(f"--max-tokens {self.max_tokens}: must be a whole number above 0")
        for flag, value in (("--threshold", self.threshold), ("--character-threshold", self.character_threshold)):
            if value is not None and not 0 <= value <= 1:
                raise Refused(f"{flag} {value}: must be a number from 0 to 1")
        given = {
            "model": self.model, "detail": self.detail, "prompt": self.prompt, "max_tokens": self.max_tokens,
            "threshold": self.threshold, "character_threshold": self.character_threshold,
            "categories": self.categories or None, "keep_underscores": self.keep_underscores or None,
            "device": device, "precision": precision,
        }  # fmt: skip
        return request_for(
            self.captioner, given, subject=self.kind, trigger=self.trigger.strip(),
            trigger_position=self.trigger_position, drop=self.drop or (),
        )  # fmt: skip
