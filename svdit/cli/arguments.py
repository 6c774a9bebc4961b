"""Parsing without torch: one-line usage errors, checked numbers, paths and names, choices defined elsewhere."""

import argparse
import ast
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from svdit.printing import write_error

PACKAGE = Path(__file__).parents[1]
LARGEST = 2**63 - 1
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
LONG = 80  # characters of a value that are shown


class Parser(argparse.ArgumentParser):
    """A parser whose usage errors are one line, with exit code 2; options are spelled out."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, allow_abbrev=False, **options)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The parsed arguments; an unknown one is an error, with the closest option."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            options = list(self._option_string_actions)
            close = [option for option in options if option.endswith(name.removeprefix("-"))]  # --steps: by its end
            suggestion = "".join(f"; did you mean {o}?" for o in (close or get_close_matches(name, options, 1))[:1])
            self.error(f"unrecognized arguments: {' '.join(unknown)}{suggestion}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit."""
        fail(f"{self.prog}: {message}; see `{self.prog} --help`")


def fail(line: str) -> NoReturn:
    """Print the line and exit with code 2; of several processes under torchrun, one prints it and all exit."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or "MASTER_ADDR" not in os.environ:
        write_error(line)
        sys.exit(2)
    from svdit import peers

    peers.fail(line)


def quoted(text: str) -> str:
    """The text of an argument in quotes; only the beginning of a long one."""
    return repr(text if len(text) <= LONG else f"{text[:LONG]}...")


def integer(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """An argparse type: an integer from `least` to `most`."""

    def parse(text: str) -> int:
        if text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most:
            return int(text)
        bound = "2^63 - 1" if most == LARGEST else most
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not an integer from {least} to {bound}")

    return parse


def number(condition: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse type: a finite number for which `holds`; `condition` describes it, "above 0" for example."""

    def parse(text: str) -> float:
        value = float(text) if NUMBER.fullmatch(text) else math.nan
        if math.isfinite(value) and holds(value):
            return value
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number {condition}")

    return parse


def path(text: str) -> str:
    """An argparse type: a file or folder, which need not exist; neither a pipe nor a device."""
    try:
        mode = Path(text).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"{quoted(text)} cannot be used ({reason}); pass another path") from None
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not a path")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is neither a file nor a folder; pass another path")
    return text


def path_or_none(text: str) -> str:
    """An argparse type: as `path`, or empty for none."""
    return path(text) if text else text


def output(text: str) -> Path:
    """An argparse type: as `path`, of what is written."""
    return Path(path(text))


def names(what: str, choices: Sequence[str] = ()) -> Callable[[str], list[str]]:
    """An argparse type: comma-separated names, each once, and one of `choices` if there are any."""

    def parse(text: str) -> list[str]:
        parts = [part.strip() for part in text.split(",")]
        for name in parts:
            if not name or parts.count(name) > 1:
                problem = f"names {name} {parts.count(name)} times" if name else "has an empty name"
                raise argparse.ArgumentTypeError(f"{quoted(text)} {problem}; pass each {what} once")
            if choices and name not in choices:
                raise argparse.ArgumentTypeError(f"there is no {what} {quoted(name)}; choose from {', '.join(choices)}")
        return parts

    return parse


natural, positive = integer(0), integer(1)
pixels, batch, many = integer(1, 8192), integer(1, 2**16), integer(1, 10**6)
above_0 = number("above 0 and at most 1e6", lambda x: 0 < x <= 1e6)
scale = number("from 0 to 100", lambda x: 0 <= x <= 100)
decibels = number("above 0 and at most 200", lambda x: 0 < x <= 200)
share = number("of at least 0 and below 1", lambda x: 0 <= x < 1)
ratio = number("above 0 and at most 1", lambda x: 0 < x <= 1)


def keys(file: str, name: str) -> list[str]:
    """The keys of the dict literal `name` in svdit/`file`, read from the source, since importing it imports torch."""
    for node in _statements(file):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if ast.unparse(target) == name:
                return [ast.literal_eval(key) for key in node.value.keys if key]
    raise LookupError(f"{file} has no dict literal {name}")


@cache
def _statements(file: str) -> list[ast.stmt]:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body
