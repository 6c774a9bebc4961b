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
    p.add_argument("--force", action="store_true", help="also print rows of different protocols, marked")
    return p


def run(args: argparse.Namespace) -> Result:
    """The table."""
    from svdit.evaluation.compare import comparison

    table = comparison(args.reports, args.metrics, args.force)
    rows = [{"file": path, **row} for path, row in zip(args.reports, table.to_json(), strict=True)]
    return Result({"rows": rows}, table.text().split("\n"))
