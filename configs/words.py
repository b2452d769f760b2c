"""How many of what, as people say it."""


def counted(count: int, one: str, many: str = "") -> str:
    """`1 picture`, `3 pictures`."""
    return f"{count} {one if count == 1 else many or one + 's'}"
