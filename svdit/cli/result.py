"""What a command prints at its end."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.printing import is_first, write_json, write_out

if TYPE_CHECKING:
    from rich.console import RenderableType

    Line = str | Path | RenderableType


@dataclass(frozen=True)
class Result:
    """What is printed: `text`, with --quiet `brief` where there is one, with --json `data` (see docs/scripting.md).

    A `problem` is an error with exit code 1. `then` is called after printing, as a server waits until it is ended.
    """

    data: dict[str, Any]
    text: Sequence["Line"]
    brief: Sequence["Line"] = ()
    problem: str = ""
    then: Callable[[], object] = lambda: None

    def print(self, args: argparse.Namespace) -> None:
        """Print it to stdout, on the first process of a run."""
        if not is_first():
            return
        if args.json:
            write_json(self.data)
            return
        for line in (args.quiet and self.brief) or self.text:
            if isinstance(line, str | Path):
                write_out(line)
            else:
                from svdit.report.tables import console

                console().print(line)


def add_options(parser: argparse.ArgumentParser) -> None:
    """--quiet, --json"""
    add = parser.add_argument_group("printing").add_argument
    add("--quiet", action="store_true", help="print the result only, and warnings and errors")
    add("--json", action="store_true", help="print the result as one JSON object")
