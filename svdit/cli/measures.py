"""What `svdit evaluate` and `svdit generate --evaluate` share: the options of the metrics, and the result."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.cli.arguments import keys, names, path, path_or_none
from svdit.cli.result import Result
from svdit.errors import UserError
from svdit.printing import note

if TYPE_CHECKING:
    from svdit.evaluation.inception import Extractor
    from svdit.evaluation.options import Options
    from svdit.evaluation.report import Report

EXTRACTORS = ("inception", "random")
VARIABLE, CACHE = "SVDIT_INCEPTION_WEIGHTS", "~/.cache/svdit"


def add(parser: argparse._ActionsContainer) -> None:
    """--metrics, --paired_dir, --feature-extractor, --feature-extractor-weights, --download, --cache-dir"""
    add, metrics = parser.add_argument, keys("evaluation/metrics.py", "METRICS")
    add("--metrics", type=names("metric", metrics), help=f"of {','.join(metrics)} (default: all available)")
    add("--paired_dir", "--paired-dir", type=path, metavar="PATH", help="full-precision counterparts, for PSNR, SSIM")
    add("--feature-extractor", choices=EXTRACTORS, help="random: offline, NOT comparable (default: inception)")
    add("--feature-extractor-weights", type=path, metavar="FILE", help=f"2015 Inception weights (or set {VARIABLE})")
    add("--download", action="store_true", help="download the Inception weights (95.6 MB) if they are not found")
    add(
        "--cache-dir",
        type=path_or_none,
        default=CACHE,
        metavar="DIR",
        help="feature cache; '' disables it (default: %(default)s, or svdit in $XDG_CACHE_HOME)",
    )


def passed(args: argparse.Namespace) -> list[str]:
    """Which of them were passed."""
    names = ("metrics", "paired_dir", "feature_extractor", "feature_extractor_weights", "download", "cache_dir")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, False, CACHE)]


def options(args: argparse.Namespace, **others: Any) -> Options:
    """The options of the evaluation, with `others`. Raises UserError for two extractors."""
    from svdit.evaluation.options import Options
    from svdit.files import user_cache

    if args.feature_extractor == "random" and args.feature_extractor_weights:
        raise UserError("--feature-extractor-weights has no effect on --feature-extractor random; omit one of them")
    named = os.path.expanduser(args.cache_dir)  # noqa: PTH111, which can raise
    cache = user_cache() if args.cache_dir == CACHE else Path(named) if named else None
    options = Options(
        metrics=tuple(args.metrics) if args.metrics else None,
        paired=args.paired_dir,
        cache=cache,
        progress=True,
        **others,
    )
    if cache and args.cache_dir == CACHE and options.network_metrics and not usable(cache):
        note(f"{cache} cannot hold the features, which are not kept; choose a folder for them with --cache-dir")
        return replace(options, cache=None)
    return options


def usable(cache: Path) -> bool:
    """Whether a cache nobody asked for exists or can be made; without a home its path is not absolute."""
    from svdit.files import creatable_folder

    with suppress(UserError):
        if not cache.is_dir():
            creatable_folder(cache)
        return cache.is_absolute()
    return False


def network(args: argparse.Namespace, options: Options) -> Extractor | None:
    """The requested extractor; None if all requested metrics are of pairs. Raises UserError for missing weights."""
    if not options.network_metrics:
        return None
    from svdit.distributed import barrier, rank
    from svdit.evaluation.inception import named_extractor
    from svdit.evaluation.weights import find_weights

    name, weights = args.feature_extractor or "inception", args.feature_extractor_weights
    if name == "inception" and rank() == 0:  # a single process downloads
        find_weights(weights, options.cache, args.download)
    barrier()
    return named_extractor(name, weights, options.cache)


def result(report: Report) -> Result:
    """The table; a problem if a named metric is unavailable."""
    unavailable = f"requested but unavailable: {', '.join(report.failed)}" if report.failed else ""
    return Result(report.to_json(), report.text().split("\n"), problem=unavailable)
