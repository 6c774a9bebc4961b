"""`svdit train`: train a DiT, SiT, REPA, LightningDiT or JiT on class folders, an .npz, or scikit-learn's digits.

On one process or under torchrun:

torchrun --nproc-per-node 8 train.py --model DiT-XL/2 --data imagenet/train --bf16
"""

import argparse
import os
import sys
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.cli import outputs, setup
from svdit.cli.arguments import Parser, integer, keys, many, output, path, pixels, positive, ratio, share
from svdit.cli.result import Result
from svdit.errors import UserError
from svdit.printing import is_quiet, note, write_out

if TYPE_CHECKING:
    from svdit.model.dit import DiTConfig
    from svdit.training.data import LabelledImages
    from svdit.training.loop import TrainOptions

VAE = "ema"
RESULTS = ("last.pt", "ema.safetensors", "loss.csv", "loss.png")
EPOCHS = 1400


def parser() -> Parser:
    """The options of `svdit train`."""
    parser = Parser("svdit train", description="Train a class-conditional model. Rerun the same command to resume.")
    group = parser.add_argument_group("data and model")
    add = group.add_argument
    add(
        "--data",
        "--data-path",
        type=path,
        required=True,
        metavar="DATA",
        help="folder with one sub-folder per class; .npz with labels and arr_0, or labels, jpeg and offsets; or digits",
    )
    add(
        "--model",
        default="DiT-XL/2",
        metavar="NAME",
        help="DiT-XL/2, SiT-B/2, JiT-B/16, ...: the family decides the loss; default: %(default)s",
    )
    add("--image-size", type=pixels, metavar="PIXELS", help="default: the model's, or 256")
    add("--num-classes", type=many, metavar="K", help="default: the number of classes in the data")
    add(
        "--vae",
        type=path,
        default="auto",
        metavar="NAME",
        help="ema, mse, a local folder, a repository of Hugging Face, or none for pixel space; default: ema",
    )
    add("--latent-stats", type=path, metavar="PATH", help="latents_stats.pt, for VAEs such as VA-VAE; default: none")
    add("--augment", default="flip", choices=keys("training/data.py", "AUGMENTATIONS"), help="default: %(default)s")
    add_training(parser)
    add_machine(parser)
    return parser


def add_training(parser: Parser) -> None:
    """The options that decide the result; they must match when a run is resumed."""
    group = parser.add_argument_group("training")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=many, default=EPOCHS, metavar="N", help="default: %(default)s")
    length.add_argument("--steps", type=integer(1, 10**9), metavar="N", help="training steps, instead of --epochs")
    add = group.add_argument
    add("--global-batch-size", type=many, default=256, metavar="N", help="over all processes; default: %(default)s")
    add("--lr", type=ratio, default=1e-4, help="constant learning rate of AdamW; default: %(default)s")
    add("--ema-decay", type=share, default=0.9999, metavar="D", help="default: %(default)s")
    add("--label-dropout", type=share, default=0.1, metavar="P", help="for guidance; default: %(default)s")
    setup.add_seed(group, "--seed", "--global-seed")
    add("--bf16", action="store_true", help="train with bfloat16 autocast")


def add_machine(parser: Parser) -> None:
    """The options that may change when a run is resumed."""
    group = parser.add_argument_group("output and hardware")
    add = group.add_argument
    add(
        "--results-dir",
        type=output,
        default=Path("results"),
        metavar="DIR",
        help="writes last.pt, ema.safetensors, loss.csv, loss.png and samples/; resumes from last.pt; "
        "default: %(default)s",
    )
    add("--log-every", type=positive, default=100, metavar="STEPS", help="default: %(default)s")
    options: dict[str, Any] = {"dest": "checkpoint_every", "metavar": "STEPS", "type": positive, "default": 10_000}
    add("--ckpt-every", help="checkpoint and samples; default: %(default)s", **options)
    options = {"dest": "workers", "metavar": "N", "type": integer(0, 256), "default": workers()}
    add("--num-workers", help="data loading processes; default: 4, or as many as there are cores", **options)
    setup.add_device(group)


def workers() -> int:
    """4 data loading processes, or as many as each process on this machine has cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def run(args: argparse.Namespace) -> Result:
    """Load the data, build the model, train it. Raises UserError for options that do not fit the data."""
    import torch

    from svdit.checkpoints.store import save_model
    from svdit.distributed import rank, reserved, session
    from svdit.files import creatable_folder, writable_folder
    from svdit.model.autoencoder import load_autoencoder
    from svdit.model.dit import DiT
    from svdit.model.zoo import CONFIGS
    from svdit.progress import progress
    from svdit.training import data
    from svdit.training.loop import train
    from svdit.training.state import State

    device = setup.device(args.device)
    image_size, pixel_space = image_space(args)
    outputs.check_outside("--results-dir", args.results_dir, args.data)
    writable_folder(args.results_dir)
    creatable_folder(args.results_dir / "samples")
    for name in RESULTS:
        if (args.results_dir / name).is_dir():
            raise UserError(f"{args.results_dir / name} is a folder where a file belongs; remove or rename it")
    with session(device), reserved(args.results_dir):
        images = data.load(args.data, image_size, args.num_classes)
        if rank() == 0:
            report(images.summary())
            for remark in images.notes:
                note(remark)
        autoencoder = load_autoencoder("none" if pixel_space else VAE if args.vae == "auto" else args.vae, device)
        if image_size % autoencoder.factor:
            raise UserError(f"--image-size is {image_size}; with a VAE, choose a multiple of {autoencoder.factor}")
        config = model_config(args, images, image_size // autoencoder.factor, autoencoder.channels)
        name = args.model if CONFIGS[args.model].items() <= asdict(config).items() else ""
        options = train_options(args, len(images))
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        torch.manual_seed(args.seed)

        def export(state: State) -> None:
            provenance = {"data": Path(args.data).name, "step": state.step, "training": options.binding()}
            provenance["vae"] = autoencoder.name
            save_model(state.ema, args.results_dir / "ema.safetensors", name=name, provenance=provenance)

        model = DiT(config).to(device)
        model.class_names = images.classes
        with progress("training", rank() == 0, "steps") as tick:
            state = train(
                model,
                images,
                options,
                args.results_dir,
                name=args.model,
                autoencoder=autoencoder,
                held_out=data.digits()[1] if args.data == "digits" else None,
                export=export,
                report=report,
                progress=tick,
            )
    paths = {"output": args.results_dir / "ema.safetensors", "checkpoint": args.results_dir / "last.pt"}
    return Result({**paths, "steps": state.step, "seconds": state.seconds}, [paths["output"]])


def report(line: str) -> None:
    """Print a line of progress, unless quiet; training continues if the reader of stdout is gone."""
    with suppress(BrokenPipeError):
        if not is_quiet():
            write_out(line)
            sys.stdout.flush()


def image_space(args: argparse.Namespace) -> tuple[int, bool]:
    """Side of the images, and whether the model works on pixels.

    Raises UserError for other sizes of the digits, and for latents of an unknown autoencoder.
    """
    from svdit.model.autoencoder import SD_CHANNELS
    from svdit.model.zoo import config_for

    config, digits = config_for(args.model), args.data == "digits"
    if digits and args.image_size not in (None, 8):
        raise UserError(f"--image-size is {args.image_size}, but the digits have 8×8 pixels; omit it")
    if digits and args.vae not in ("auto", "none"):
        raise UserError(f"--vae is {args.vae}, but the digits are learned in pixel space; omit it")
    pixels = digits or setup.FACTORS.get(config.in_channels) == 1
    if args.vae == "auto" and not pixels and config.in_channels != SD_CHANNELS:
        raise UserError(
            f"{args.model} learns latents of {config.in_channels} channels; pass --vae with the folder or "
            "repository of their autoencoder, or none for pixels"
        )
    default = 8 if digits else config.input_size if pixels else 256
    return args.image_size or default, args.vae == "none" or (args.vae == "auto" and pixels)


def model_config(
    args: argparse.Namespace, images: "LabelledImages", input_size: int, channels: int | None
) -> "DiTConfig":
    """The named configuration for these images and this number of channels; None: theirs.

    Raises UserError for another number of classes than the data has, or of channels than --latent-stats.
    """
    from svdit.checkpoints.statistics import latent_statistics
    from svdit.model.zoo import config_for

    num_classes = args.num_classes or images.num_classes
    if num_classes != images.num_classes:
        raise UserError(f"--num-classes is {num_classes}, but {args.data} has {images.class_summary()}; omit it")
    sizes: dict[str, Any] = {"input_size": input_size, "in_channels": channels or images.channels}
    if args.latent_stats:
        sizes["latent_mean"], sizes["latent_std"] = latent_statistics(args.latent_stats)
    return config_for(args.model, **sizes, num_classes=num_classes)


def train_options(args: argparse.Namespace, size: int) -> "TrainOptions":
    """The options of the training loop, for a data set of `size` images."""
    from svdit.training.loop import TrainOptions

    steps = args.steps or -(-args.epochs * size // args.global_batch_size)
    return TrainOptions(**{field.name: getattr(args, field.name) for field in fields(TrainOptions)} | {"steps": steps})
