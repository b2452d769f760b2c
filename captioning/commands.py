"""`scumble caption`. torch and the models are imported only when they are needed."""

import sys
from typing import Annotated

from cyclopts import Parameter

from scumble.configs.errors import Refused

from .captioners.request import Device, Existing, Precision
from .commands_edit import Folder, undo_latest
from .flags import CaptionFlags

DEFAULTS = CaptionFlags()


def caption(
    source: Folder,
    /,
    *,
    flags: Annotated[CaptionFlags, Parameter(name="*")] = DEFAULTS,
    existing: Annotated[
        Existing,
        Parameter(help="What happens to existing captions: replace rewrites generated ones only, line adds a new line"),
    ] = "keep",
    overwrite: Annotated[bool, Parameter(help="Also replace captions written by a person", negative="")] = False,
    undo: Annotated[bool, Parameter(help="Undo the latest caption change", negative="")] = False,
    dry_run: Annotated[bool, Parameter(help="Print the captions without writing them", negative="")] = False,
    batch_size: Annotated[int, Parameter(help="Images per batch; 0: the captioner's default")] = 0,
    device: Annotated[Device | None, Parameter(help="Device to run the captioner on")] = None,
    precision: Annotated[Precision | None, Parameter(help="auto: half precision on a GPU, fp32 on the CPU")] = None,
) -> None:
    """Write a caption for every image that has none.

    A prompt can change whatever the captions name; whatever they leave out
    becomes part of the adapter. For a style, describe the content of the image
    but not how it is made. For a character, describe everything that varies
    (pose, clothes, place, medium) but not who the character is. --kind selects
    templates and filters that do this; --drop removes what they miss.

    Captions written by a person are never replaced without --overwrite. To
    continue an interrupted run, repeat the command.
    """
    if undo and dry_run:
        raise Refused("--undo: cannot be combined with --dry-run")
    if undo:
        undo_latest(source, overwrite)
        return
    if overwrite and existing not in ("keep", "replace"):
        raise Refused(f"--overwrite: replaces whole captions, but --existing {existing} keeps them; use only one")
    if batch_size < 0:
        raise Refused(f"--batch-size {batch_size}: must be a whole number above 0, or 0 for the captioner's default")
    request = flags.request(device, precision)
    from .progress import caption_progress, describe_outcome
    from .recipe import caption_set

    mode: Existing = "replace" if overwrite else existing
    try:
        with caption_progress(show_all=dry_run) as report:
            outcome = caption_set(source, request, mode, overwrite, batch_size, dry_run, report)
    except KeyboardInterrupt:
        print("interrupted: the captions written so far are kept; repeat the command to continue", file=sys.stderr)
        raise SystemExit(130) from None
    print(describe_outcome(outcome, source, request.captioner, dry_run))
