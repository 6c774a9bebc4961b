"""The commands: `svdit NAME …`, or the script of the same job in the repository's root.

Each command's module has `parser()`, which imports no torch, and `run(args)`, which returns the `Result` to print.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from types import ModuleType

from svdit import __version__
from svdit.cli.arguments import Parser, fail
from svdit.cli.result import Result, add_options
from svdit.cli.signals import ending
from svdit.errors import sentence
from svdit.printing import is_first, quietly, standard_streams, write_error

COMMANDS = {
    "sample": "sample a grid of images",
    "generate": "sample many images into a folder and an .npz, on one or more processes",
    "quantize": "quantize a checkpoint",
    "recover": "train a quantized checkpoint towards full precision, without data",
    "export": "write a checkpoint for another tool: diffusers, ONNX, or one float state dict",
    "cache": "plan which blocks to skip at which sampling steps",
    "inspect": "show what a checkpoint contains, layer by layer",
    "verify": "check a quantized checkpoint against its source",
    "evaluate": "compare two sets of images: FID and related metrics, paired differences",
    "compare": "compare the metrics of several sets in one table",
    "report": "write an HTML page about quantized models and their images",
    "app": "compare images of full-precision and quantized models in the browser",
    "selftest": "check the metric implementations on this machine",
    "train": "train a DiT, SiT, REPA, LightningDiT or JiT",
}

LESS_MEMORY = {  # what to change where the memory is not enough; others have no such option
    "sample": ("pass fewer --classes",),
    "generate": ("choose a smaller --per-proc-batch-size",),
    "quantize": ("choose a smaller --max-memory or fewer --calib-images",),
    "recover": ("choose a smaller --batch-size",),
    "cache": ("choose fewer --images",),
    "evaluate": ("choose a smaller --batch-size or --num_images",),
    "train": ("choose a smaller --global-batch-size or model",),
}
MODULES = {"generate": "sample_ddp"}  # where the module is named after its script
VARIANTS = {"quantize": ("--pipeline", "quantize_pipeline")}  # an option that makes it a command with other options


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
    with standard_streams():
        name = top.parse_args(argv[:1] or ["--help"]).command
    command(name, argv[1:])


def command(name: str, argv: list[str] | None = None) -> None:
    """Run one command and print its result."""
    with standard_streams(), ending():
        argv = sys.argv[1:] if argv is None else argv
        own = module(name, argv)
        args = parser(name, argv).parse_args(argv)
        args.command_line = shlex.join(["svdit", name, *argv])  # for the outputs that record it
        with explained(name), quietly(args.quiet), redirect_stdout(sys.stderr if args.json else sys.stdout):
            result: Result | None = own.run(args)
        if result:  # after all files are written: printing fails where the reader of a pipe has gone
            result.print(args)
            sys.stdout.flush()
            with explained(name):
                result.then()
        if result and result.problem:
            if is_first():
                write_error(f"svdit {name}: {result.problem}")
            sys.exit(1)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """End the command with one line and exit code 2 for an error that the user can fix."""
    try:
        yield
    except Exception as error:
        sys.stdout.flush()  # fails again where stdout is what cannot be written
        message = sentence(error, *LESS_MEMORY.get(name, ()))
        if message is None:
            raise
        fail(f"svdit {name}: {message}")


def parser(name: str, argv: Sequence[str] = ()) -> Parser:
    """The parser of a command with these arguments, with the options that all have."""
    parser: Parser = module(name, argv).parser()
    add_options(parser)
    return parser


def module(name: str, argv: Sequence[str] = ()) -> ModuleType:
    """The module of a command with these arguments."""
    option, variant = VARIANTS.get(name, ("", ""))
    other = option and any(argument.partition("=")[0] == option for argument in argv)
    return import_module(f"svdit.cli.{variant if other else MODULES.get(name, name)}")
