"""The Markdown reference of all options, generated from their declarations (`scumble options`, configs/OPTIONS.md)."""

from .options import Declared, Options, declared

HEAD = """# Options

Each option has one name: `learning_rate` in the table `[optimization]` of a TOML file is `--learning-rate` on the
command line. Values come from defaults < preset < file < flags. `auto` is chosen from the base, the images and the
machine; the run prints its plan. `scumble options` prints this page.
"""


def reference() -> str:
    """Return the reference, with one Markdown table per TOML table."""
    lines = [HEAD]
    table = ""
    for entry in declared():
        if entry.table != table:
            table = entry.table
            section = Options.model_fields[table].annotation
            assert section is not None
            lines += [f"\n## [{table}]\n\n{section.__doc__}\n"]
            lines += ["| key | flag | default | values | description |", "|---|---|---|---|---|"]
        lines.append(_row(entry))
    return "\n".join(lines) + "\n"


def _row(entry: Declared) -> str:
    default = "none" if entry.default in ("", ()) else str(entry.default)
    default = default.lower() if isinstance(entry.default, bool) else default
    values = entry.allowed.replace("|", "\\|") + (f" ({entry.unit})" if entry.unit else "")
    description = entry.help.replace("|", "\\|")
    return f"| `{entry.key}` | `{entry.flag}` | {default} | {values} | {description} |"
