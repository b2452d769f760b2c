"""Flags of `scumble caption` that say what a caption is to be, and the request that they make."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from scumble.configs.errors import Refused

from .captioners.request import Category, Detail, Device, Precision, Request, SubjectKind


@dataclass(frozen=True)
class CaptionFlags:
    """One flag a field; None is the captioner's own default."""

    captioner: Annotated[
        Literal["filename", "blip", "florence2", "vlm", "wd-tagger"],
        Parameter(
            help="filename: its words; blip: a short sentence; florence2: sentences; vlm: any model that takes "
            "pictures and does as told, as Qwen-VL; wd-tagger: tags, for drawings"
        ),
    ] = "filename"
    kind: Annotated[
        SubjectKind, Parameter(help="What the set teaches: captions leave out its looks, or who the character is")
    ] = "style"
    model: Annotated[str | None, Parameter(help="Folder or hub id of the model; none: the captioner's usual")] = None
    detail: Annotated[Detail | None, Parameter(help="How much is told; CLIP reads about 50 words")] = None
    prompt: Annotated[
        str | None, Parameter(help="Words for the model instead of its template; blip goes on from them")
    ] = None
    max_tokens: Annotated[int | None, Parameter(help="Longest answer")] = None
    threshold: Annotated[float | None, Parameter(help="Least probability of a tag; none: 0.35")] = None
    character_threshold: Annotated[
        float | None, Parameter(help="Least probability of a character's name; none: 0.85")
    ] = None
    categories: Annotated[
        tuple[Category, ...] | None,
        Parameter(help="Kinds of tags that are said; none: general", consume_multiple=True, negative=""),
    ] = None
    keep_underscores: Annotated[
        bool, Parameter(help="Leave tags as long_hair; else spaces, but for faces as ^_^", negative="")
    ] = False
    trigger: Annotated[
        str, Parameter(help="Words that call the adapter; training puts them in front too if it is told them")
    ] = ""
    trigger_position: Annotated[
        Literal["front", "end", "none"], Parameter(help="Where they are written; none: only the template knows them")
    ] = "front"
    drop: Annotated[
        tuple[str, ...] | None,
        Parameter(help="Words and tags that are never written", consume_multiple=True, negative=""),
    ] = None

    def request(self, device: Device | None, precision: Precision | None) -> Request:
        """What is asked of the captioner. Raises `Refused` for a value out of range or a flag that is not for it."""
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
