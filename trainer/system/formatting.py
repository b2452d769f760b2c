"""Human-readable sizes and durations."""


def format_bytes(size: float) -> str:
    """A number of bytes as 620 kB, 38.1 MB or 2.4 GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if round(size / unit, 1) >= 1:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """A duration as 45 s, 3 min or 1 h 20 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
