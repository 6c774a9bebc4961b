"""`svdit train`: train a DiT on a folder of class folders, an .npz, or scikit-learn's digits; alone or under torchrun.

torchrun --nproc-per-node 8 train.py --model DiT-XL/2 --data imagenet/train --bf16
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.cli import setup
from svdit.errors import UserError

if TYPE_CHECKING:
    from svdit.model.dit import DiTConfig
    from svdit.training.data import Pictures
    from svdit.training.loop import TrainOptions

VAE = "ema"
EPOCHS = 1400


def parser() -> argparse.ArgumentParser:
    """The flags of `svdit train`."""
    parser = argparse.ArgumentParser("svdit train", description="Train a class-conditional DiT.")
    data = parser.add_argument_group("data and model")
    data.add_argument(
        "--data",
        "--data-path",
        required=True,
        metavar="DATA",
        help="a folder with one sub-folder a class; an .npz with arr_0 or jpeg, offsets, and labels; or digits",
    )
    data.add_argument("--model", default="DiT-XL/2", metavar="NAME", help="default: DiT-XL/2")
    data.add_argument("--image-size", type=setup.positive, metavar="PIXELS", help="default: the model's, or 256")
    data.add_argument("--num-classes", type=setup.positive, metavar="K", help="default: as many as the data has")
    data.add_argument(
        "--vae", default="auto", metavar="NAME", help="ema, mse, a local folder, or none to learn pixels; default: ema"
    )
    data.add_argument("--augment", default="flip", choices=["none", "flip", "shift"], help="default: flip")
    add_course(parser)
    add_machine(parser)
    return parser


def add_course(parser: argparse.ArgumentParser) -> None:
    """The flags that decide what is computed."""
    group = parser.add_argument_group("course")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=setup.positive, default=EPOCHS, help=f"default: {EPOCHS}")
    length.add_argument("--steps", type=setup.positive, help="instead of epochs")
    group.add_argument("--global-batch-size", type=setup.positive, default=256, metavar="N", help="default: 256")
    group.add_argument("--lr", type=float, default=1e-4, help="of AdamW, constant; default: 1e-4")
    group.add_argument("--ema-decay", type=float, default=0.9999, metavar="D", help="default: 0.9999")
    group.add_argument("--label-dropout", type=float, default=0.1, metavar="P", help="to the null class; default: 0.1")
    group.add_argument("--seed", "--global-seed", type=setup.seed, default=0, help="default: 0")
    group.add_argument("--bf16", action="store_true", help="compute in bfloat16 where that is safe (autocast)")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The flags that may change when a run goes on."""
    group = parser.add_argument_group("files and machine")
    group.add_argument(
        "--results-dir",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="gets last.pt, ema.safetensors, loss.csv, loss.png and samples/; a run there goes on; default: results",
    )
    group.add_argument("--log-every", type=setup.positive, default=100, metavar="STEPS", help="default: 100")
    group.add_argument(
        "--ckpt-every", type=setup.positive, default=10_000, metavar="STEPS", help="and samples; default: 10000"
    )
    group.add_argument("--num-workers", type=int, default=4, metavar="N", help="reading processes; default: 4")
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...; default: a GPU where there is one")


def run(args: argparse.Namespace) -> None:
    """Read the data, build the model, train it."""
    import torch

    from svdit.checkpoints.store import save_model
    from svdit.distributed import rank, session
    from svdit.files import writable_folder
    from svdit.model.autoencoder import load_autoencoder
    from svdit.model.dit import DiT
    from svdit.model.zoo import CONFIGS
    from svdit.training import data
    from svdit.training.loop import train
    from svdit.training.state import State

    device = setup.device(args.device)
    image_size, pixels = picture_size(args)
    writable_folder(args.results_dir)
    with session(device):
        pictures = data.load(args.data, image_size)
        autoencoder = load_autoencoder("none" if pixels else VAE if args.vae == "auto" else args.vae, device)
        config = model_config(args, pictures, image_size // autoencoder.factor, autoencoder.channels)
        name = args.model if CONFIGS[args.model].items() <= asdict(config).items() else ""  # else it is another model
        course = train_options(args, len(pictures))
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        torch.manual_seed(args.seed)

        def export(state: State) -> None:
            provenance = {"data": Path(args.data).name, "step": state.step, "training": course.binding()}
            save_model(state.ema, args.results_dir / "ema.safetensors", name=name, provenance=provenance)

        train(
            DiT(config).to(device),
            pictures,
            course,
            args.results_dir,
            encode=autoencoder.encode,
            decode=autoencoder.decode,
            held_out=data.digits()[1] if args.data == "digits" else None,
            export=export,
        )
        if rank() == 0:
            print(args.results_dir / "ema.safetensors")


def picture_size(args: argparse.Namespace) -> tuple[int, bool]:
    """The side of the pictures, and whether the model learns pixels and not a VAE's latents."""
    from svdit.model.zoo import config_for

    config = config_for(args.model)
    by_nature = config.in_channels != setup.LATENT_CHANNELS or args.data == "digits"
    if args.data == "digits" and args.image_size not in (None, 8):
        raise UserError(f"--image-size is {args.image_size}, but the digits have 8×8 pixels; leave it out")
    default = 8 if args.data == "digits" else config.input_size if by_nature else 256
    return args.image_size or default, args.vae == "none" or (args.vae == "auto" and by_nature)


def model_config(args: argparse.Namespace, pictures: "Pictures", input_size: int, channels: int | None) -> "DiTConfig":
    """The named configuration for these pictures; `channels` None means theirs."""
    from svdit.model.zoo import config_for

    num_classes = args.num_classes or pictures.num_classes
    if num_classes < pictures.num_classes:
        raise UserError(f"--num-classes is {num_classes}, but {args.data} has {pictures.num_classes}; leave it out")
    sizes: dict[str, Any] = {"input_size": input_size, "in_channels": channels or pictures.channels}
    return config_for(args.model, **sizes, num_classes=num_classes)


def train_options(args: argparse.Namespace, size: int) -> "TrainOptions":
    from svdit.training.loop import TrainOptions

    return TrainOptions(
        seed=args.seed,
        global_batch_size=args.global_batch_size,
        lr=args.lr,
        ema_decay=args.ema_decay,
        label_dropout=args.label_dropout,
        augment=args.augment,
        bf16=args.bf16,
        steps=args.steps or -(-args.epochs * size // args.global_batch_size),
        log_every=args.log_every,
        checkpoint_every=args.ckpt_every,
        workers=args.num_workers,
    )
