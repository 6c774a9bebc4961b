"""`svdit evaluate`: measure generated images against real ones and against their full-precision counterparts."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from svdit.cli.arguments import Parser
from svdit.errors import UserError

DESCRIPTION = """\
FID, sFID, KID, Inception Score, precision, recall, density, coverage, MIND and FID∞ in one pass of the network, with
standard errors; PSNR, SSIM and relative L2 against full-precision counterparts of the same names. Start it with
torchrun to share the images among processes."""
EXTRACTORS = ("inception", "random")


def parser() -> Parser:
    p = Parser("svdit evaluate", description=DESCRIPTION)
    add = p.add_argument
    add("--real_dir", "--real-dir", metavar="PATH", help="real images: folder, .npz of images, or .npz of statistics")
    add("--fake_dir", "--fake-dir", metavar="PATH", required=True, help="generated images: folder or .npz")
    add("--num_images", "--num-images", type=int, metavar="N", help="a seeded choice from each side (default: all)")
    add("--metrics", help="of fid,sfid,kid,is,prc,mind,fid_inf,paired,lpips (default: what can be had)")
    add("--paired_dir", "--paired-dir", metavar="PATH", help="full-precision counterparts, for PSNR, SSIM, relative L2")
    add("--compare_dir", "--compare-dir", metavar="PATH", help="a second generated set of the same seeds: differences")
    add("--feature-extractor", choices=EXTRACTORS, default=EXTRACTORS[0], help="random: offline, NOT comparable")
    add("--feature-extractor-weights", metavar="FILE", help="2015 Inception weights (or set SVDIT_INCEPTION_WEIGHTS)")
    add("--download", action="store_true", help="fetch the Inception weights (95.6 MB) if they are not found")
    add("--cache-dir", metavar="DIR", default="~/.cache/svdit", help="of features; '' keeps none [%(default)s]")
    add("--save-stats", metavar="FILE", help="write the real side's statistics, to be given as --real_dir later")
    add("--resize-to", type=int, metavar="SIZE", help="crop and resize every image, as ADM prepares ImageNet")
    add("--allow-fewer", action="store_true", help="take all where there are fewer than --num_images")
    add("--batch-size", type=int, default=32)
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--seed", type=int, default=0, help="of the choice of images")
    add("--output", metavar="DIR", help="write metrics.json, metrics.md and pictures there")
    return p


def run(args: argparse.Namespace) -> None:
    from svdit.distributed import rank, session
    from svdit.evaluation.evaluate import evaluate
    from svdit.evaluation.options import Options

    options = Options(
        metrics=tuple(args.metrics.split(",")) if args.metrics else None,
        num_images=args.num_images,
        paired=args.paired_dir,
        compare=args.compare_dir,
        seed=args.seed,
        resize_to=args.resize_to,
        allow_fewer=args.allow_fewer,
        batch_size=args.batch_size,
        device=_device(args.device),
        cache=Path(args.cache_dir).expanduser() if args.cache_dir else None,
        save_stats=Path(args.save_stats) if args.save_stats else None,
    )
    _check_writable(args.output, options)
    with session(options.device):
        report = evaluate(args.real_dir, args.fake_dir, _network(args, options), options, _progress)
        if rank() == 0:
            _print(report)
            if args.output:
                report.save(Path(args.output))
    if report.failed:
        print(f"svdit evaluate: asked for, but not to be had: {', '.join(report.failed)}", file=sys.stderr)
        sys.exit(1)


def _check_writable(output: str | None, options: Any) -> None:
    """Before the long work."""
    from svdit.files import writable_folder

    statistics = options.save_stats and options.save_stats.parent
    for folder in (output, statistics, options.cache if options.network_metrics else None):
        if folder:
            writable_folder(folder)


def _device(name: str | None) -> Any:
    import torch

    from svdit.distributed import default_device

    try:
        device = default_device() if name is None else torch.device(name)
    except RuntimeError:
        raise UserError(f"there is no device {name}; give cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here; leave --device out or give cpu")
    return device


def _network(args: argparse.Namespace, options: Any) -> Any:
    """The extractor that was asked for, on the device; None where only paired metrics are."""
    if not options.network_metrics:
        return None
    from svdit.distributed import barrier, rank
    from svdit.evaluation.inception import load_extractor, random_extractor
    from svdit.evaluation.weights import DEFAULT_CACHE, find_weights, load_weights

    if args.feature_extractor == "random":
        return random_extractor().to(options.device)
    folder = options.cache or DEFAULT_CACHE
    if rank() == 0:  # only one process downloads
        find_weights(args.feature_extractor_weights, folder, args.download)
    barrier()
    return load_extractor(*load_weights(find_weights(args.feature_extractor_weights, folder))).to(options.device)


def _progress(items: Iterable[Any], name: str, count: int) -> Iterable[Any]:
    """A bar on the first process; items are images, or batches of them that start with their places."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from svdit.distributed import rank

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=rank() > 0 or not console.is_terminal) as bar:
        task = bar.add_task(name, total=count)
        for item in items:
            yield item
            bar.advance(task, len(item[0]) if isinstance(item, (list, tuple)) else 1)


def _print(report: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from svdit.evaluation.report import NOT_COMPARABLE

    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in report.columns():
        table.add_column(column, no_wrap=True, justify="left" if column == "metric" else "right")
    for row in report.rows():
        table.add_row(*row)
    console.print(table)
    if not report.comparable:
        console.print(NOT_COMPARABLE, style="bold red")
    fake, real = report.inputs["fake"], report.inputs.get("real")
    console.print(f"{fake['images']} generated images of {fake['path']}")
    if real is not None:
        console.print(f"{report.protocol['n_real']} real images of {real['path']}")
    for note in report.notes():
        console.print(note, markup=False, style="yellow" if note.startswith("warning") else None)
