"""`svdit compare`: metrics of several sets in one table, with differences and their errors."""

import argparse

from svdit.cli.arguments import Parser


def parser() -> Parser:
    p = Parser("svdit compare", description=__doc__)
    p.add_argument(
        "reports", nargs="+", metavar="REPORT", help="metrics.json, or its folder; the first is the baseline"
    )
    p.add_argument("--metrics", help="comma-separated names as in metrics.json (default: the usual ones)")
    p.add_argument("--force", action="store_true", help="print rows of unlike protocols too, marked")
    return p


def run(args: argparse.Namespace) -> None:
    from svdit.evaluation.compare import compare

    print(compare(args.reports, args.metrics.split(",") if args.metrics else None, args.force))
