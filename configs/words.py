"""Counts with the right plural."""


def counted(count: int, one: str, many: str = "") -> str:
    """Return `1 image` or `3 images`; `many` is an irregular plural."""
    return f"{count} {one if count == 1 else many or one + 's'}"
