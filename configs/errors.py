"""The error type for problems the user can fix: the command line prints it as one line, without a traceback."""

from difflib import get_close_matches


class Refused(Exception):  # noqa: N818  (a refusal is not a bug in the program)
    """A one-line message: the option or file, the problem, and the fix.

    `exit_code` is 2 for invalid options or data, 69 if a package, model or device is missing, and 73 for a path that
    cannot be written (sysexits.h).
    """

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def printable(text: str) -> str:
    """Replace line breaks and control characters with spaces: text from untrusted files could control the terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


def did_you_mean(name: str, known: list[str]) -> str:
    """Return ` (did you mean X?)` with the closest known name, or an empty string if none is close."""
    close = get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
