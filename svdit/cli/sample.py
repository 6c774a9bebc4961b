"""`svdit sample`: one image per class, in a grid.

Noise is drawn in the order of the published scripts, so on a GPU a seed reproduces DiT's images.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from svdit.cli import outputs, sampling, setup
from svdit.cli.arguments import Parser
from svdit.cli.result import Result

if TYPE_CHECKING:
    from svdit.model.autoencoder import Autoencoder
    from svdit.model.dit import DiT
    from svdit.sampling.batch import SamplingConfig

PUBLISHED_CLASSES = [207, 360, 387, 974, 88, 979, 417, 279]
COLUMNS = 4
MIN_SIDE = 128  # smaller images are enlarged to about this many pixels
CFG_SCALE, VAE = 4.0, "mse"
DOUBLED = ("dit", "sit")  # families whose scripts draw the noise of steps for both halves of guidance


def parser() -> Parser:
    """The options of `svdit sample`."""
    parser = Parser("svdit sample", description="Sample a grid of images, one per class.")
    setup.add_model(parser)
    setup.add_speed(parser)
    sampling.add_sampling(parser, CFG_SCALE, VAE)
    add = parser.add_argument
    add("--classes", nargs="+", metavar="CLASS", help="names or numbers; default: eight of the model's classes")
    setup.add_seed(parser)
    outputs.add_output(parser, "sample.png", metavar="PNG")
    return parser


class Job(NamedTuple):
    """What `load` prepares; `record` is printed with --json."""

    model: "DiT"
    autoencoder: "Autoencoder"
    config: "SamplingConfig"
    labels: list[int]
    record: dict[str, Any]


def run(args: argparse.Namespace) -> Result:
    """Check the options, lock the output, and draw into it."""
    from svdit.files import exclusive

    outputs.output_file(args, ".png", ".PNG")
    setup.read_ahead(args)
    with exclusive(args.output):
        with setup.uncollected():
            job = load(args)
        chosen = {"classes": job.labels, "checkpoint": job.record["checkpoint"], "seed": args.seed}
        settings = chosen | asdict(job.config) | job.record
        draw(job, settings, args.output)
    return Result({"output": args.output} | settings, [args.output])


def load(args: argparse.Namespace) -> Job:
    """The model and the autoencoder that the options ask for, and all settings."""
    from svdit.sampling.labels import class_numbers

    device = setup.device(args.device)
    checkpoint = setup.load_checkpoint(args, device, to_pack=True)
    outputs.check_distinct("--output", args.output, checkpoint.path)
    config, vae, _, record = sampling.settings(args, checkpoint.model, CFG_SCALE)
    record |= {"checkpoint": checkpoint.path, "caching": sampling.caching(args, checkpoint.model, config)}
    model = setup.accelerated(checkpoint.model, args)
    labels = class_numbers(args.classes or default_classes(model.config.num_classes), model)
    return Job(model, sampling.load_vae(vae, model, device, VAE, checkpoint.path), config, labels, record)


def draw(job: Job, settings: dict[str, Any], output: Path) -> None:
    """Sample, and write the grid with the settings in it."""
    from svdit import __version__, images
    from svdit.diffusion.noise import batch_noise
    from svdit.progress import progress
    from svdit.sampling.batch import generate_images

    model, autoencoder, config, labels, _ = job
    device, doubled = model.pos_embed.device, model.config.family in DOUBLED
    noise = batch_noise(settings["seed"], (len(labels), *model.input_shape), device, doubled)
    steps = len(config.schedule(model.config))
    with progress("sampling", unit="steps") as tick:
        samples = generate_images(
            model, labels, config, autoencoder=autoencoder, noise=noise, callback=lambda done, x: tick(done, steps)
        )
    scale = max(1, MIN_SIDE // samples.shape[1])
    settings = {"tool": "svdit", "version": __version__} | settings | {"checkpoint": settings["checkpoint"].name}
    images.write_png(output, images.grid(samples, min(COLUMNS, len(samples)), scale=scale), settings)


def default_classes(num_classes: int) -> list[int]:
    """The eight published classes of ImageNet, or the first eight of another data set."""
    return PUBLISHED_CLASSES if num_classes == 1000 else list(range(min(8, num_classes)))
