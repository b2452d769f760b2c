"""Which of a run's adapters stay on the disk, and how much room a run needs there."""

from collections.abc import Sequence
from pathlib import Path

from scumble.configs.errors import Refused

from ..system.formatting import format_bytes
from ..system.output_paths import free_bytes

STATES_AT_ONCE = 3  # two that stay and one that is being staged
MOMENTS = 3  # fp32 parameters and two moments of theirs
GRID_MB, PICTURE_BYTES_PER_PIXEL = 4, 2


def surplus(saved: Sequence[tuple[str, float]], keep: str, count: int) -> list[str]:
    """Names to delete of `saved`, (name, loss since the one before) in order: all but the last or the best `count`."""
    if keep == "all" or len(saved) <= count:
        return []
    ranked = [name for name, _ in (sorted(saved, key=lambda one: -one[1]) if keep == "best" else saved)]
    return ranked[:-count]


def disk_needed(
    num_parameters: int, bytes_each: int, num_saves: int, keep: str, keep_count: int, ema: bool, preview_px: int
) -> int:
    """Bytes of a whole run at most: adapters, states, and previews of `preview_px` pixels in all."""
    kept = num_saves if keep == "all" else min(num_saves, keep_count + 1)
    adapters = (kept + 1) * num_parameters * bytes_each
    states = STATES_AT_ONCE * num_parameters * 4 * (MOMENTS + ema)
    return adapters + states + preview_px * PICTURE_BYTES_PER_PIXEL + GRID_MB * 2**20


def check_disk(folder: Path, needed: int) -> int:
    """Free bytes where `folder` lies. Raises `Refused` (73) where they and what it holds are fewer than `needed`.

    What an earlier try left in the folder is part of what the run needs.
    """
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = free_bytes(folder)
    if needed > free + held:
        raise Refused(
            f"--output-dir {folder}: the run needs up to {format_bytes(needed)}, {format_bytes(free)} are free; make room, use "
            "another --output-dir, or keep fewer adapters (--keep-checkpoints last, a larger --save-every)",
            73,
        )
    return free
