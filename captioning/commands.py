"""`scumble caption`. Models and torch are imported when it needs them."""

import sys
from typing import Annotated

from cyclopts import Parameter

from scumble.configs.errors import Refused

from .captioners.request import Device, Existing, Precision
from .commands_edit import Folder, take_back
from .flags import CaptionFlags

DEFAULTS = CaptionFlags()


def caption(
    source: Folder,
    /,
    *,
    wanted: Annotated[CaptionFlags, Parameter(name="*")] = DEFAULTS,
    existing: Annotated[
        Existing, Parameter(help="Captions that are there: replace touches none by hand, line adds one as a new line")
    ] = "keep",
    overwrite: Annotated[bool, Parameter(help="Replace captions that a person wrote too", negative="")] = False,
    undo: Annotated[bool, Parameter(help="Take back the latest change of captions", negative="")] = False,
    dry_run: Annotated[bool, Parameter(help="Print the captions and write nothing", negative="")] = False,
    batch_size: Annotated[int, Parameter(help="Images at once; 0: the default of the captioner")] = 0,
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
    if batch_size < 0:
        raise Refused(
            f"--batch-size {batch_size}: must be a whole number above 0, or 0 for the default of the captioner"
        )
    request = wanted.request(device, precision)
    from .progress import caption_progress, describe_outcome
    from .recipe import caption_set

    way: Existing = "replace" if overwrite else existing
    try:
        with caption_progress(show_all=dry_run) as tell:
            outcome = caption_set(source, request, way, overwrite, batch_size, dry_run, tell)
    except KeyboardInterrupt:
        print("stopped: the captions so far stay, and the same command goes on with the others", file=sys.stderr)
        raise SystemExit(130) from None
    print(describe_outcome(outcome, source, request.captioner, dry_run))
