"""`svdit compare`: the metrics of several sets in one table, with differences and their errors."""

import argparse

from svdit.cli.arguments import Parser, names, path
from svdit.cli.result import Result


def parser() -> Parser:
    """The command's flags."""
    p = Parser("svdit compare", description=__doc__)
    p.add_argument(
        "reports", nargs="+", type=path, metavar="REPORT", help="metrics.json or its folder; the first is the baseline"
    )
    p.add_argument(
        "--metrics", type=names("metric"), help="comma-separated keys of metrics.json (default: the usual ones)"
    )
    p.add_argument("--sort", default="", metavar="METRIC", help="order the rows below the baseline, best first")
    p.add_argument("--force", action="store_true", help="also print rows of different protocols, marked")
    p.add_argument(
        "--format",
        choices=("text", "markdown", "latex"),
        default="text",
        help="text of at most 100 columns, or one table for a page or a paper; default: %(default)s",
    )
    return p


def run(args: argparse.Namespace) -> Result:
    """The table."""
    from svdit.evaluation.compare import comparison

    table = comparison(args.reports, args.metrics, args.force, args.sort)
    text = {"text": table.text, "markdown": table.markdown, "latex": table.latex}[args.format]()
    return Result({"rows": table.to_json()}, text.split("\n"))
