"""Parsing without torch: one-line usage errors, checked numbers, and choices that are defined elsewhere."""

import argparse
import ast
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from svdit.printing import write_error

PACKAGE = Path(__file__).parents[1]
LARGEST = 2**63 - 1


class Parser(argparse.ArgumentParser):
    """A parser whose usage errors are one line, with exit code 2."""

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


def integer(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """An argparse type: an integer from `least` to `most`."""

    def parse(text: str) -> int:
        if text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most:
            return int(text)
        bound = "2^63 - 1" if most == LARGEST else most
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {least} to {bound}")

    return parse


def number(condition: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse type: a finite number for which `holds`; `condition` describes it, "above 0" for example."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and holds(value):
            return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {condition}".rstrip())

    return parse


natural, positive = integer(0), integer(1)
finite = number("", lambda x: True)
above_0 = number("above 0", lambda x: x > 0)
not_negative = number("of at least 0", lambda x: x >= 0)
share = number("from 0 to 1", lambda x: 0 <= x <= 1)
ratio = number("above 0 and at most 1", lambda x: 0 < x <= 1)


def keys(file: str, name: str) -> list[str]:
    """The keys of the dict literal `name` in svdit/`file`, read from the source, since importing it imports torch."""
    for node in ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if ast.unparse(target) == name:
                return [ast.literal_eval(key) for key in node.value.keys if key]
    raise LookupError(f"{file} has no dict literal {name}")
