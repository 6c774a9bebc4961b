"""The commands: `svdit NAME …`, or the script of the same job in the repository's root.

Each module of this folder named below has `parser()`, which imports nothing heavy, and `run(args)`.
"""

import argparse
import sys
from importlib import import_module

from svdit import __version__
from svdit.errors import UserError

COMMANDS = {
    "sample": "draw a grid of pictures",
    "generate": "draw many pictures into a folder and an .npz, alone or under torchrun",
    "quantize": "quantize a checkpoint",
    "inspect": "say what a checkpoint is, layer by layer",
    "verify": "check a quantized checkpoint against its source",
    "evaluate": "compare a set of pictures with another: FID and its family, paired differences",
    "compare": "put the metrics of several sets into one table, with differences and errors",
    "selftest": "check that the metrics are computed correctly here",
    "train": "train a DiT",
}

MODULES = {"generate": "sample_ddp"}  # where the module is named after its script


def main(argv: list[str] | None = None) -> None:
    """`svdit NAME …`"""
    argv = sys.argv[1:] if argv is None else argv
    width = max(map(len, COMMANDS))
    summary = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    top = argparse.ArgumentParser(
        "svdit",
        description=f"commands:\n{summary}\n\n`svdit COMMAND --help` tells the rest.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"svdit {__version__}")
    top.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    command(top.parse_args(argv[:1]).command, argv[1:])


def command(name: str, argv: list[str] | None = None) -> None:
    """Run one command; what the user can mend ends as one sentence and exit code 2."""
    module = import_module(f"svdit.cli.{MODULES.get(name, name)}")
    args = module.parser().parse_args(argv)
    try:
        module.run(args)
    except UserError as error:
        print(f"svdit {name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
