"""`scumble cache list|clear`: the latents that are kept for the next run."""

from typing import Annotated

from cyclopts import App, Parameter

from ..system.formatting import format_bytes

cache = App(name="cache", help="Latents of pictures that are kept for the next run.")

Folder = Annotated[str, Parameter(help="Folder of the cache; auto: the user's cache folder")]


@cache.command(name="list")
def list_cache(*, folder: Folder = "auto") -> None:
    """Say where the cache lies, how many pictures it holds, and how large it is."""
    from scumble.datasets.cache import cache_in

    found = cache_in(folder)
    sizes = found.sizes()
    print(f"{found.folder}: {len(sizes)} entries, {format_bytes(sum(sizes))}")


@cache.command
def clear(
    *,
    folder: Folder = "auto",
    older_than: Annotated[float, Parameter(help="Only what was written so many days ago")] = 0.0,
) -> None:
    """Delete entries; the next run encodes its pictures again."""
    from scumble.datasets.cache import cache_in

    found = cache_in(folder)
    count, freed = found.clear(older_than)
    print(f"{found.folder}: {count} entries deleted, {format_bytes(freed)} freed")
