"""Printing for the commands: every text fits on its line and into the terminal's encoding.

What comes from files, paths and checkpoints cannot move the cursor, change the text before it or add lines.
"""

import io
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def printable(text: object) -> str:
    """The text on one line: controls, line separators, bidirectional marks and stray bytes of names as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def write_out(*lines: object) -> None:
    """Print lines to stdout."""
    for line in lines:
        print(printable(line))


def write_json(data: object) -> None:
    """Print data to stdout as one line of JSON in ASCII; NaN and infinity become null, scalars of NumPy Python's."""
    print(json.dumps(finite(data), default=lambda value: value.item() if hasattr(value, "item") else str(value)))


def finite(data: object) -> object:
    """The data, in which None replaces floats that JSON does not have."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_error(line: object) -> None:
    """Print a line to stderr; a reader that is gone does not change the exit code."""
    with suppress(OSError):
        print(printable(line), file=sys.stderr, flush=True)


_quiet = False


@contextmanager
def quietly(active: bool) -> Iterator[None]:
    """Without notes and progress, if `active`."""
    global _quiet
    before, _quiet = _quiet, active
    try:
        yield
    finally:
        _quiet = before


def is_quiet() -> bool:
    """Whether notes and progress are left out."""
    return _quiet


def is_first() -> bool:
    """Whether this is the only process or the first one of torchrun's, also after they have parted."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def note(message: object) -> None:
    """Print a note to stderr on the first process, unless quiet."""
    if is_first() and not _quiet:
        write_error(f"note: {message}")


def warn(message: object) -> None:
    """Print a warning to stderr; the work continues."""
    write_error(f"warning: {message}")


@contextmanager
def standard_streams() -> Iterator[None]:
    """Let stdout and stderr accept every character, closed ones too.

    Where stdout cannot be written, exits without a traceback: with code 1 if its reader is gone (`… | head -1`), with a
    sentence and code 2 if its disk is full.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # or the next file that is opened becomes a closed stdout, and is written by libraries in C
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
        setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # or the interpreter does it at exit, and reports the error
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        write_error(f"svdit: cannot write to stdout ({error.strerror}); send it elsewhere")
        sys.exit(2)
