"""`scumble caption`. Models and torch are imported when it needs them."""

import sys
from typing import Annotated, Literal

from cyclopts import Parameter

from scumble.configs.errors import Refused

from .commands_edit import Folder, take_back
from .request import Category, Detail, Device, Existing, Precision, Subject


def caption(
    source: Folder,
    /,
    *,
    captioner: Annotated[
        Literal["filename", "blip", "florence2", "vlm", "wd-tagger"],
        Parameter(
            help="filename: its words; blip: a short sentence; florence2: sentences; vlm: any model that takes "
            "pictures and does as told, as Qwen-VL; wd-tagger: tags, for drawings"
        ),
    ] = "filename",
    kind: Annotated[
        Subject, Parameter(help="What the set teaches: captions leave out its looks, or who the character is")
    ] = "style",
    model: Annotated[str | None, Parameter(help="Folder or hub id of the model; none: the captioner's usual")] = None,
    detail: Annotated[Detail | None, Parameter(help="How much is told; CLIP reads about 50 words")] = None,
    prompt: Annotated[
        str | None, Parameter(help="Words for the model instead of its template; blip goes on from them")
    ] = None,
    max_tokens: Annotated[int | None, Parameter(help="Longest answer")] = None,
    threshold: Annotated[float | None, Parameter(help="Least probability of a tag; none: 0.35")] = None,
    character_threshold: Annotated[
        float | None, Parameter(help="Least probability of a character's name; none: 0.85")
    ] = None,
    categories: Annotated[
        list[Category] | None,
        Parameter(help="Kinds of tags that are said; none: general", consume_multiple=True, negative=""),
    ] = None,
    keep_underscores: Annotated[
        bool, Parameter(help="Leave tags as long_hair; else spaces, but for faces as ^_^", negative="")
    ] = False,
    trigger: Annotated[
        str, Parameter(help="Words that call the adapter; training puts them in front too if it is told them")
    ] = "",
    trigger_at: Annotated[
        Literal["front", "back", "none"], Parameter(help="Where they are written; none: only the template knows them")
    ] = "front",
    drop: Annotated[
        list[str] | None,
        Parameter(help="Words and tags that are never written", consume_multiple=True, negative=""),
    ] = None,
    existing: Annotated[
        Existing, Parameter(help="Captions that are there: replace touches none by hand, line adds one as a new line")
    ] = "keep",
    overwrite: Annotated[bool, Parameter(help="Replace captions that a person wrote too", negative="")] = False,
    undo: Annotated[bool, Parameter(help="Take back the latest change of captions", negative="")] = False,
    dry_run: Annotated[bool, Parameter(help="Print the captions and write nothing", negative="")] = False,
    batch: Annotated[int, Parameter(help="Pictures at once; 0: the captioner's usual")] = 0,
    device: Annotated[Device | None, Parameter(help="Where to compute")] = None,
    precision: Annotated[Precision | None, Parameter(help="auto: half precision on a GPU, fp32 on the CPU")] = None,
) -> None:
    """Write a caption beside every picture that has none.

    What captions name, a prompt can change later; what they leave unsaid goes
    into the adapter. For a style, tell what is in the picture and nothing of
    how it is painted. For a character, tell all that changes (pose, clothes,
    place, how it is painted) and nothing of who it is. The templates and
    filters of --kind do so; what they miss, --drop takes out.

    A caption that a person wrote is never replaced without --overwrite. A run
    that is cut goes on where it was.
    """
    if undo and dry_run:
        raise Refused("--undo writes: it has no --dry-run")
    if undo:
        take_back(source, overwrite)
        return
    if overwrite and existing not in ("keep", "replace"):
        raise Refused(f"--overwrite replaces whole captions, --existing {existing} keeps them: use one of the two")
    if batch < 0 or (max_tokens is not None and max_tokens < 1):
        raise Refused("--batch and --max-tokens: must be whole numbers above 0")
    for flag, value in (("--threshold", threshold), ("--character-threshold", character_threshold)):
        if value is not None and not 0 <= value <= 1:
            raise Refused(f"{flag} {value}: must be a number from 0 to 1")
    from .captioner import request_for
    from .progress import Progress, told

    given = {
        "model": model, "detail": detail, "prompt": prompt, "max_tokens": max_tokens, "threshold": threshold,
        "character_threshold": character_threshold, "categories": tuple(categories) if categories else None,
        "keep_underscores": keep_underscores or None, "device": device, "precision": precision,
    }  # fmt: skip
    request = request_for(
        captioner, given, subject=kind, trigger=trigger.strip(), trigger_at=trigger_at, drop=tuple(drop or ())
    )
    from .recipe import caption_set

    way: Existing = "replace" if overwrite else existing
    try:
        with Progress(everything=dry_run) as progress:
            outcome = caption_set(source, request, way, overwrite, batch, dry_run, progress.tell)
    except KeyboardInterrupt:
        print("stopped: the captions so far stay, and the same command goes on with the others", file=sys.stderr)
        raise SystemExit(130) from None
    print(told(outcome, source, captioner, dry_run))
