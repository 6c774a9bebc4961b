"""`svdit app`: a page on this machine that draws images in full precision and quantized, side by side."""

import argparse

from svdit.cli import setup
from svdit.cli.arguments import Parser, integer, path
from svdit.cli.result import Result

PORT = 7860


def parser() -> Parser:
    """The options of `svdit app`."""
    parser = Parser(
        "svdit app",
        description="Serve a page at 127.0.0.1, for browsers on this machine: images of a model in full precision and "
        "quantized, from the same noise, with their time, memory and PSNR. It needs Gradio (pip install 'svdit[app]') "
        "and no network. Ctrl-C ends it.",
    )
    parser.add_argument(
        "models",
        nargs="*",
        type=path,
        metavar="CHECKPOINT",
        help="full-precision checkpoints to offer before the digits models",
    )
    parser.add_argument("--port", type=integer(1, 65535), default=PORT, help="default: %(default)s")
    setup.add_device(parser)
    return parser


def run(args: argparse.Namespace) -> Result:
    """Check the models and start the server, which runs until the command is ended.

    Raises UserError for files that cannot be compared, where Gradio is missing, and for a port in use.
    """
    from svdit.checkpoints.store import embedded_models, locate
    from svdit.cli.app_page import serve
    from svdit.cli.side_by_side import classes

    device = setup.device(args.device)
    models = {name: locate(name) for name in args.models}
    for file in models.values():
        classes(file, device)
    server = serve(models | dict(sorted(embedded_models().items())), device, args.port)
    return Result({"url": server.url}, [server.url], then=server.wait)
