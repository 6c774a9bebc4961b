"""The commands: `svdit NAME …`, or the script of the same job in the repository's root.

Each command's module has `parser()`, which imports no torch, and `run(args)`.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from svdit import __version__
from svdit.cli.arguments import Parser
from svdit.errors import UserError

COMMANDS = {
    "sample": "sample a grid of images",
    "generate": "sample many images into a folder and an .npz, on one or more processes",
    "quantize": "quantize a checkpoint",
    "inspect": "show what a checkpoint contains, layer by layer",
    "verify": "check a quantized checkpoint against its source",
    "evaluate": "compare two sets of images: FID and related metrics, paired differences",
    "compare": "compare the metrics of several sets in one table",
    "selftest": "check the metric implementations on this machine",
    "train": "train a DiT",
}

MODULES = {"generate": "sample_ddp"}  # where the module is named after its script


def main(argv: list[str] | None = None) -> None:
    """`svdit NAME …`"""
    argv = sys.argv[1:] if argv is None else argv
    width = max(map(len, COMMANDS))
    summary = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    top = Parser(
        "svdit",
        description=f"commands:\n{summary}\n\nFor the options of a command, see `svdit COMMAND --help`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"svdit {__version__}")
    top.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    with quiet_pipe():
        name = top.parse_args(argv[:1]).command
    command(name, argv[1:])


def command(name: str, argv: list[str] | None = None) -> None:
    """Run one command; a UserError ends it with one line and exit code 2."""
    module = import_module(f"svdit.cli.{MODULES.get(name, name)}")
    with quiet_pipe():
        args = module.parser().parse_args(argv)
        try:
            module.run(args)
        except UserError as error:
            print(f"svdit {name}: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)


@contextmanager
def quiet_pipe() -> Iterator[None]:
    """Exit with code 1 and without a traceback if the reader of stdout is gone (`… | head -1`)."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # or the interpreter does it at exit, and reports the error
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
