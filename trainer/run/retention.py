"""Which checkpoints of a run to keep, and how much disk space a run needs."""

from collections.abc import Sequence
from pathlib import Path

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import CANNOT_WRITE

from ..system.formatting import format_bytes
from ..system.output_paths import free_bytes

STATES_AT_ONCE = 3  # two kept states and one being staged
TENSORS_PER_PARAMETER = 3  # fp32 weights and two moments
GRID_MB, IMAGE_BYTES_PER_PIXEL = 4, 2


def surplus(saved: Sequence[tuple[str, float]], keep: str, count: int) -> list[str]:
    """Names to delete from `saved` (name, loss since the previous one): all but the last or the best `count`."""
    if keep == "all" or len(saved) <= count:
        return []
    ranked = [name for name, _ in (sorted(saved, key=lambda one: -one[1]) if keep == "best" else saved)]
    return ranked[:-count]


def disk_needed(
    num_parameters: int, bytes_each: int, num_saves: int, keep: str, keep_count: int, ema: bool, preview_px: int
) -> int:
    """Upper bound of the bytes that a run writes: adapters, states, and previews of `preview_px` pixels in total."""
    kept = num_saves if keep == "all" else min(num_saves, keep_count + 1)
    adapters = (kept + 1) * num_parameters * bytes_each
    states = STATES_AT_ONCE * num_parameters * 4 * (TENSORS_PER_PARAMETER + ema)
    return adapters + states + preview_px * IMAGE_BYTES_PER_PIXEL + GRID_MB * 2**20


def check_disk(folder: Path, needed: int) -> int:
    """Return the free bytes on the disk of `folder`. Raises `Refused` (73) if the run needs more.

    Files that an earlier attempt left in `folder` count toward `needed`.
    """
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = free_bytes(folder)
    if needed > free + held:
        raise Refused(
            f"--output-dir {folder}: the run needs up to {format_bytes(needed)}, but only {format_bytes(free)} is "
            "free; free up space, use another --output-dir, or keep fewer checkpoints (--keep-checkpoints last, or a "
            "larger --save-every)",
            CANNOT_WRITE,
        )
    return free
