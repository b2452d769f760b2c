"""`scumble cache list|clear`: the latents that are cached on disk for later runs."""

from typing import Annotated

from cyclopts import App, Parameter

from ..system.formatting import format_bytes

cache = App(name="cache", help="Show or clear the latents that are cached for later runs.")

Folder = Annotated[str, Parameter(help="Cache folder; auto: the user's cache folder")]


@cache.command(name="list")
def list_cache(*, folder: Folder = "auto") -> None:
    """Show where the cache is, how many entries it has, and how large it is."""
    from scumble.datasets.cache import cache_in

    found = cache_in(folder)
    sizes = found.sizes()
    print(f"{found.folder}: {len(sizes)} entries, {format_bytes(sum(sizes))}")


@cache.command
def clear(
    *,
    folder: Folder = "auto",
    older_than: Annotated[float, Parameter(help="Only entries that are older than this many days")] = 0.0,
) -> None:
    """Delete entries. The next run encodes its images again."""
    from scumble.datasets.cache import cache_in

    found = cache_in(folder)
    count, freed = found.clear(older_than)
    print(f"{found.folder}: {count} entries deleted, {format_bytes(freed)} freed")
