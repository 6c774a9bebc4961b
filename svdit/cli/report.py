"""`svdit report`: one HTML file from reports of `quantize`, sets of `generate` and metrics of `evaluate`."""

import argparse

from svdit.cli import outputs
from svdit.cli.arguments import Parser, path
from svdit.cli.result import Result


def parser() -> Parser:
    """The command's flags."""
    parser = Parser(
        "svdit report",
        description="Write one HTML file, which needs no network: sizes, layers, images from the same noise, metrics. "
        "Several models stand side by side.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=path,
        metavar="RUN",
        help="a quantized checkpoint or its .report.json, a folder or .npz of svdit generate, a metrics.json, a .png, "
        "or a folder of these",
    )
    outputs.add_output(parser, "report.html")
    return parser


def run(args: argparse.Namespace) -> Result:
    """Read everything and write the page. Raises UserError for outputs and inputs that cannot be used."""
    from svdit.report.page import write_page

    outputs.output_file(args, ".html")
    outputs.check_distinct("--output", args.output, *args.runs)
    page = write_page(args.runs, args.output)
    data = {"output": args.output, "models": page.models, "images": page.images, "notes": page.notes}
    return Result(data, [*page.notes, args.output], [args.output])
