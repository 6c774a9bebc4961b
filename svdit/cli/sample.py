"""`svdit sample`: one picture of each class asked for, in a grid.

Noise is drawn in the published script's order, so on a GPU a seed gives the known pictures.
"""

import argparse
from pathlib import Path

from svdit.cli import setup
from svdit.errors import UserError

PUBLISHED_CLASSES = [207, 360, 387, 974, 88, 979, 417, 279]
COLUMNS = 4
VISIBLE = 128  # smaller pictures are enlarged to about this side
VAE = "mse"


def parser() -> argparse.ArgumentParser:
    """The flags of `svdit sample`."""
    parser = argparse.ArgumentParser("svdit sample", description="Draw a grid of pictures, one for each class.")
    setup.add_model(parser)
    setup.add_speed(parser)
    setup.add_sampling(parser, cfg_scale=4.0, vae=VAE)
    parser.add_argument("--classes", type=int, nargs="+", metavar="CLASS", help="default: eight of the model's classes")
    parser.add_argument("--seed", type=setup.seed, default=0, help="default: 0")
    parser.add_argument("--output", type=Path, default=Path("sample.png"), metavar="PNG", help="default: sample.png")
    return parser


def run(args: argparse.Namespace) -> None:
    """Load, draw, write the grid and print its path."""
    import torch

    from svdit import images
    from svdit.diffusion.noise import batch_noise
    from svdit.diffusion.schedule import make_schedule
    from svdit.files import writable_folder
    from svdit.sampling.batch import pictures

    config = setup.sampling_config(args)
    if args.output.suffix.lower() != ".png":
        raise UserError(f"--output is {args.output}, but the grid is a PNG; give a name that ends in .png")
    writable_folder(args.output.parent)
    device = setup.device(args.device)
    model = setup.accelerated(setup.load_checkpoint(args, device).model, args)
    labels = torch.tensor(args.classes or default_classes(model.config.num_classes))
    autoencoder = setup.load_vae(args.vae, model, device, VAE)
    side = model.config.input_size
    noise = batch_noise(args.seed, (len(labels), model.config.in_channels, side, side), device, doubled=True)
    steps = len(make_schedule(config.steps))
    with setup.progress("sampling") as tick:
        drawn = pictures(model, autoencoder, labels, noise, config, callback=lambda done, x: tick(done, steps))
    scale = max(1, VISIBLE // drawn.shape[1])
    images.write_png(args.output, images.grid(drawn, min(COLUMNS, len(drawn)), scale=scale))
    print(args.output)


def default_classes(num_classes: int) -> list[int]:
    """The published eight of ImageNet's 1000 classes; of other models the first eight."""
    return PUBLISHED_CLASSES if num_classes == 1000 else list(range(min(8, num_classes)))
