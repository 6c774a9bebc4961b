"""`svdit evaluate`: measure generated images against real ones and against their full-precision counterparts."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from svdit.cli import measures, outputs
from svdit.cli.arguments import Parser, batch, integer, output, path, pixels, positive
from svdit.cli.result import Result
from svdit.cli.setup import device
from svdit.errors import UserError
from svdit.printing import note

if TYPE_CHECKING:
    from svdit.evaluation.options import Options

DESCRIPTION = """\
FID and other metrics of Inception features in one pass, with error bars; PSNR, SSIM and relative L2 against
full-precision counterparts of the same names. Run it with torchrun to share the images among processes."""


def parser() -> Parser:
    """The command's flags."""
    p = Parser("svdit evaluate", description=DESCRIPTION)
    add = p.add_argument
    add("--real_dir", "--real-dir", type=path, metavar="PATH", help="real images (folder, .tar, .npz) or statistics")
    add("--fake_dir", "--fake-dir", type=path, metavar="PATH", required=True, help="generated: folder, .tar or .npz")
    add(
        "--num_images", "--num-images", type=positive, metavar="N", help="a seeded choice from each side (default: all)"
    )
    measures.add(p)
    add("--compare_dir", "--compare-dir", type=path, metavar="PATH", help="a second generated set of the same seeds")
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


def run(args: argparse.Namespace) -> Result:
    """Evaluate and save; a problem if a named metric is unavailable. Raises UserError for two extractors."""
    from svdit.distributed import rank, reserved, session
    from svdit.evaluation.evaluate import evaluate

    options = measures.options(
        args,
        num_images=args.num_images,
        compare=args.compare_dir,
        seed=args.seed,
        resize_to=args.resize_to,
        allow_fewer=args.allow_fewer,
        batch_size=args.batch_size,
        device=device(args.device),
        save_stats=args.save_stats,
    )
    check_outputs(args, options)
    for sentence in idle(args, options):
        note(sentence)
    with session(options.device), reserved(*filter(None, (args.output, options.save_stats))):
        report = evaluate(args.real_dir, args.fake_dir, measures.network(args, options), options)
        versions = {**report.versions, "machine": outputs.machine(options.device)}
        report = replace(report, versions=versions, command=args.command_line)
        if rank() == 0 and args.output:
            report.save(args.output)
    return measures.result(report)


def idle(args: argparse.Namespace, options: "Options") -> Iterator[str]:
    """A sentence for every option that changes nothing."""
    if not options.network_metrics and "lpips" not in (options.metrics or ()):
        networks = [option for option in measures.passed(args) if option not in ("--metrics", "--paired-dir")]
        yield from (f"{option} has no effect: these metrics need no network" for option in networks)
    if args.num_images is None:
        chosen = {"--allow-fewer": args.allow_fewer, "--seed": args.seed}
        yield from (f"{option} has no effect without --num_images" for option, value in chosen.items() if value)


def check_outputs(args: argparse.Namespace, options: "Options") -> None:
    """Raises UserError for outputs that are or change an input, or cannot be written, before any computation."""
    from svdit.files import creatable_folder

    inputs = [p for p in (args.real_dir, args.fake_dir, args.paired_dir, args.compare_dir) if p]
    if args.output:
        outputs.check_outside("--output", args.output, *inputs)
    if args.save_stats and args.save_stats.suffix != ".npz":
        raise UserError(f"--save-stats is {args.save_stats}; choose a name that ends in .npz")
    if args.save_stats:
        weights = [args.feature_extractor_weights] if args.feature_extractor_weights else []
        outputs.check_distinct("--save-stats", args.save_stats, *inputs, *weights)
    statistics = options.save_stats and options.save_stats.parent
    cache = options.cache if options.network_metrics else None
    if cache and cache.is_dir():  # a shared one may be read-only
        cache = None
    for folder in (args.output, statistics, cache):
        if folder:
            creatable_folder(folder)
