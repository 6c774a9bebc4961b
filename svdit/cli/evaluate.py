"""`svdit evaluate`: measure generated images against real ones and against their full-precision counterparts."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from svdit.cli.arguments import Parser, keys
from svdit.cli.setup import device
from svdit.errors import UserError
from svdit.printing import write_error, write_out

if TYPE_CHECKING:
    from svdit.evaluation.inception import Extractor
    from svdit.evaluation.options import Options

DESCRIPTION = """\
FID and other metrics of Inception features in one pass, with error bars; PSNR, SSIM and relative L2 against
full-precision counterparts of the same names. Run it with torchrun to share the images among processes."""
EXTRACTORS = ("inception", "random")


def parser() -> Parser:
    """The command's flags."""
    p = Parser("svdit evaluate", description=DESCRIPTION)
    add = p.add_argument
    add("--real_dir", "--real-dir", metavar="PATH", help="real images: folder, .npz of images, or .npz of statistics")
    add("--fake_dir", "--fake-dir", metavar="PATH", required=True, help="generated images: folder or .npz")
    add("--num_images", "--num-images", type=int, metavar="N", help="a seeded choice from each side (default: all)")
    add("--metrics", help=f"of {','.join(keys('evaluation/metrics.py', 'METRICS'))} (default: all available)")
    add("--paired_dir", "--paired-dir", metavar="PATH", help="full-precision counterparts, for PSNR, SSIM, relative L2")
    add("--compare_dir", "--compare-dir", metavar="PATH", help="a second generated set of the same seeds: differences")
    add("--feature-extractor", choices=EXTRACTORS, default=EXTRACTORS[0], help="random: offline, NOT comparable")
    add("--feature-extractor-weights", metavar="FILE", help="2015 Inception weights (or set SVDIT_INCEPTION_WEIGHTS)")
    add("--download", action="store_true", help="download the Inception weights (95.6 MB) if they are not found")
    add("--cache-dir", metavar="DIR", default="~/.cache/svdit", help="feature cache; '' disables it [%(default)s]")
    add("--save-stats", metavar="FILE", help="write the statistics of the real images, for use as --real_dir")
    add("--resize-to", type=int, metavar="SIZE", help="crop and resize every image, as ADM prepares ImageNet")
    add("--allow-fewer", action="store_true", help="use all images where there are fewer than --num_images")
    add("--batch-size", type=int, default=32)
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--seed", type=int, default=0, help="of the choice of images")
    add("--output", metavar="DIR", help="write metrics.json, metrics.md and image grids to this folder")
    return p


def run(args: argparse.Namespace) -> None:
    """Evaluate, save, print; exit code 1 if a named metric is unavailable."""
    from svdit.distributed import rank, reserved, session
    from svdit.evaluation.evaluate import evaluate
    from svdit.evaluation.options import Options

    options = Options(
        metrics=tuple(name.strip() for name in args.metrics.split(",")) if args.metrics else None,
        num_images=args.num_images,
        paired=args.paired_dir,
        compare=args.compare_dir,
        seed=args.seed,
        resize_to=args.resize_to,
        allow_fewer=args.allow_fewer,
        batch_size=args.batch_size,
        device=device(args.device),
        cache=Path(args.cache_dir).expanduser() if args.cache_dir else None,
        save_stats=Path(args.save_stats) if args.save_stats else None,
        progress=True,
    )
    _check_writable(args.output, options)
    with session(options.device), reserved(*filter(None, (args.output, options.save_stats))):
        report = evaluate(args.real_dir, args.fake_dir, _network(args, options), options)
        if rank() == 0:
            if args.output:  # before printing, which fails when the reader of a pipe has gone
                report.save(Path(args.output))
            write_out(*report.text().split("\n"))
    if report.failed:
        write_error(f"svdit evaluate: requested but unavailable: {', '.join(report.failed)}")
        sys.exit(1)


def _check_writable(output: str | None, options: "Options") -> None:
    """Raise UserError now rather than after a long computation."""
    from svdit.files import writable_folder

    statistics = options.save_stats and options.save_stats.parent
    for folder in (output, statistics, options.cache if options.network_metrics else None):
        if folder:
            writable_folder(folder)


def _network(args: argparse.Namespace, options: "Options") -> "Extractor | None":
    """The requested extractor; None if all requested metrics are of pairs."""
    if not options.network_metrics:
        return None
    from svdit.distributed import barrier, rank
    from svdit.evaluation.inception import load_extractor, random_extractor
    from svdit.evaluation.weights import DEFAULT_CACHE, find_weights, load_weights

    if args.feature_extractor == "random":
        if args.feature_extractor_weights:
            raise UserError("--feature-extractor-weights has no effect on --feature-extractor random; omit one of them")
        return random_extractor()
    folder = options.cache or DEFAULT_CACHE
    if rank() == 0:  # a single process downloads
        find_weights(args.feature_extractor_weights, folder, args.download)
    barrier()
    return load_extractor(*load_weights(find_weights(args.feature_extractor_weights, folder)))
