"""`svdit evaluate`: measure generated images against real ones and against their full-precision counterparts."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from svdit.cli import outputs
from svdit.cli.arguments import Parser, batch, integer, keys, names, output, path, path_or_none, pixels, positive
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
VARIABLE, CACHE = "SVDIT_INCEPTION_WEIGHTS", "~/.cache/svdit"


def parser() -> Parser:
    """The command's flags."""
    p = Parser("svdit evaluate", description=DESCRIPTION)
    add = p.add_argument
    metrics = keys("evaluation/metrics.py", "METRICS")
    add("--real_dir", "--real-dir", type=path, metavar="PATH", help="real images: folder, .npz of images or statistics")
    add("--fake_dir", "--fake-dir", type=path, metavar="PATH", required=True, help="generated images: folder or .npz")
    add(
        "--num_images", "--num-images", type=positive, metavar="N", help="a seeded choice from each side (default: all)"
    )
    add("--metrics", type=names("metric", metrics), help=f"of {','.join(metrics)} (default: all available)")
    add("--paired_dir", "--paired-dir", type=path, metavar="PATH", help="full-precision counterparts, for PSNR, SSIM")
    add("--compare_dir", "--compare-dir", type=path, metavar="PATH", help="a second generated set of the same seeds")
    add("--feature-extractor", choices=EXTRACTORS, help="random: offline, NOT comparable (default: inception)")
    add("--feature-extractor-weights", type=path, metavar="FILE", help=f"2015 Inception weights (or set {VARIABLE})")
    add("--download", action="store_true", help="download the Inception weights (95.6 MB) if they are not found")
    add(
        "--cache-dir",
        type=path_or_none,
        default=CACHE,
        metavar="DIR",
        help="feature cache; '' disables it (default: %(default)s)",
    )
    add(
        "--save-stats",
        type=output,
        metavar="NPZ",
        help="write the statistics of the real images, for use as --real_dir",
    )
    add("--resize-to", type=pixels, metavar="SIZE", help="crop and resize every image, as ADM prepares ImageNet")
    add("--allow-fewer", action="store_true", help="use all images where there are fewer than --num_images")
    add("--batch-size", type=batch, default=32, help="default: %(default)s")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="of the choice of images (default: %(default)s)")
    add("--output", type=output, metavar="DIR", help="write metrics.json, metrics.md and image grids to this folder")
    return p


def run(args: argparse.Namespace) -> None:
    """Evaluate, save, print; exit code 1 if a named metric is unavailable. Raises UserError for two extractors."""
    from svdit.distributed import rank, reserved, session
    from svdit.evaluation.evaluate import evaluate
    from svdit.evaluation.options import Options

    options = Options(
        metrics=tuple(args.metrics) if args.metrics else None,
        num_images=args.num_images,
        paired=args.paired_dir,
        compare=args.compare_dir,
        seed=args.seed,
        resize_to=args.resize_to,
        allow_fewer=args.allow_fewer,
        batch_size=args.batch_size,
        device=device(args.device),
        cache=Path(args.cache_dir).expanduser() if args.cache_dir else None,
        save_stats=args.save_stats,
        progress=True,
    )
    if args.feature_extractor == "random" and args.feature_extractor_weights:
        raise UserError("--feature-extractor-weights has no effect on --feature-extractor random; omit one of them")
    check_outputs(args, options)
    with session(options.device), reserved(*filter(None, (args.output, options.save_stats))):
        report = evaluate(args.real_dir, args.fake_dir, _network(args, options), options)
        if rank() == 0:
            if args.output:  # before printing, which fails when the reader of a pipe has gone
                report.save(args.output)
            write_out(*report.text().split("\n"))
    if report.failed:
        write_error(f"svdit evaluate: requested but unavailable: {', '.join(report.failed)}")
        sys.exit(1)


def check_outputs(args: argparse.Namespace, options: "Options") -> None:
    """Raises UserError for outputs that are or change an input, or cannot be written, before any computation."""
    from svdit.files import writable_folder

    inputs = [p for p in (args.real_dir, args.fake_dir, args.paired_dir, args.compare_dir) if p]
    if args.output:
        outputs.check_outside("--output", args.output, *inputs)
    if args.save_stats and args.save_stats.suffix != ".npz":
        raise UserError(f"--save-stats is {args.save_stats}; choose a name that ends in .npz")
    if args.save_stats:
        weights = [args.feature_extractor_weights] if args.feature_extractor_weights else []
        outputs.check_distinct("--save-stats", args.save_stats, *inputs, *weights)
    statistics = options.save_stats and options.save_stats.parent
    for folder in (args.output, statistics, options.cache if options.network_metrics else None):
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
        return random_extractor()
    folder = options.cache or DEFAULT_CACHE
    if rank() == 0:  # a single process downloads
        find_weights(args.feature_extractor_weights, folder, args.download)
    barrier()
    return load_extractor(*load_weights(find_weights(args.feature_extractor_weights, folder)))
