"""The one error type for what a person can mend: the command line prints it as one line, no traceback."""

from difflib import get_close_matches


class Refused(Exception):  # noqa: N818  (a refusal is not a fault of the program)
    """Says what is wrong, where, and what to do, in one line.

    `exit_code` is 2 for options or data that are refused, 69 for something needed that is missing,
    73 for a place that cannot be written (sysexits.h).
    """

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def printable(text: str) -> str:
    """The text on one line, without control characters, which in a stranger's file could steer the terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def did_you_mean(name: str, known: list[str]) -> str:
    """` (did you mean X?)`, or nothing where no known name is near."""
    close = get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
