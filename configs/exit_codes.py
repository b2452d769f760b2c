"""The exit codes of every command: stable, so that scripts and schedulers can decide whether to retry."""

DONE = 0
FAULT = 1
REFUSED = 2
BAD_DATA = 65
UNAVAILABLE = 69
CANNOT_WRITE = 73
RESUMABLE = 75
INTERRUPTED = 130

EXIT_CODES = {
    DONE: "done",
    FAULT: "a bug in scumble (a traceback is printed)",
    REFUSED: "options or data are refused; the same command will be refused again",
    BAD_DATA: "`check` or `adapter verify` found a serious problem",
    UNAVAILABLE: "something is missing or too small: a package, a base model, memory",
    CANNOT_WRITE: "a file cannot be written, or the disk is full",
    RESUMABLE: "stopped, and can be resumed: SIGTERM, SIGHUP, `scumble stop`, out of memory, a lost GPU",
    INTERRUPTED: "Ctrl-C",
}
"""What each code means. 65 to 75 follow sysexits.h, 130 is 128 + SIGINT."""
