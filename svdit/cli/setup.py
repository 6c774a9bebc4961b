"""Flags that several commands share, and what they mean together: device, checkpoint, model, autoencoder.

Torch is imported inside the functions that need it, so that `--help` answers at once. A checkpoint says itself what
it is; --model, --image-size and --num-classes are claims that are checked against it, never imposed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from svdit.errors import UserError

if TYPE_CHECKING:
    import torch

    from svdit.model.autoencoder import Autoencoder
    from svdit.model.dit import DiT
    from svdit.sampling.batch import SamplingConfig

CFG_CHANNELS = {"three": 3, "all": None}
PUBLISHED = "DiT-XL/2"
LATENT_CHANNELS, LATENT_FACTOR = 4, 8
BACKENDS = ["auto", "cpu", "torch-int8", "triton", "dequant", "reference"]
LEAVES = 20


class Checkpoint(NamedTuple):
    """A model and where it came from; `header` is None for files that do not describe themselves."""

    name: str
    path: Path
    header: dict[str, Any] | None
    model: DiT


def positive(text: str) -> int:
    """An argparse type: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def seed(text: str) -> int:
    """An argparse type: a whole number from 0 to 2^63 − 1."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def add_model(parser: argparse.ArgumentParser) -> None:
    """--ckpt, --model, --image-size, --num-classes, --device"""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--ckpt", metavar="PATH", help="a file, or 'digits'; without it the published DiT-XL/2 is fetched"
    )
    group.add_argument("--model", metavar="NAME", help="DiT-XL/2, DiT-B/4, ...; the checkpoint is checked for it")
    group.add_argument("--image-size", type=positive, metavar="PIXELS", help="side of a picture; checked likewise")
    group.add_argument("--num-classes", type=positive, metavar="K", help="number of classes; checked likewise")
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...; default: a GPU where there is one")


def add_speed(parser: argparse.ArgumentParser) -> None:
    """--backend, --debug"""
    group = parser.add_argument_group("how quantized layers are computed")
    group.add_argument("--backend", default="auto", choices=BACKENDS, help="default: the fastest of this machine")
    group.add_argument("--debug", action="store_true", help="stop at the first layer that is given no finite numbers")


def add_sampling(parser: argparse.ArgumentParser, cfg_scale: float, vae: str) -> None:
    """--sampler, --num-sampling-steps, --cfg-scale, --cfg-channels, --cfg-interval, --vae"""
    group = parser.add_argument_group("sampling")
    group.add_argument("--sampler", default="ddpm", choices=["ddpm", "ddim", "dpm++"], help="default: ddpm")
    group.add_argument("--num-sampling-steps", default="250", metavar="STEPS", help="250, ddim50, ...; default: 250")
    group.add_argument("--cfg-scale", type=float, default=cfg_scale, help=f"guidance, 1 is none; default: {cfg_scale}")
    group.add_argument(
        "--cfg-channels",
        default="three",
        choices=CFG_CHANNELS,
        help="channels that are guided; default, as published: three",
    )
    group.add_argument(
        "--cfg-interval",
        nargs=2,
        type=int,
        metavar=("FIRST", "LAST"),
        help="guide at these timesteps (0 to 999) only, which is faster and gives other pictures; default: at all",
    )
    group.add_argument(
        "--vae",
        default="auto",
        metavar="NAME",
        help=f"ema, mse, a local folder, or none for a model of pixels; default: {vae} for a model of latents",
    )


def sampling_config(args: argparse.Namespace) -> SamplingConfig:
    from svdit.sampling.batch import SamplingConfig

    channels, interval = CFG_CHANNELS[args.cfg_channels], args.cfg_interval and tuple(args.cfg_interval)
    return SamplingConfig(args.sampler, args.num_sampling_steps, args.cfg_scale, channels, interval)


def flat(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts with dotted names, in order; a large dict of numbers counts as a leaf left out."""
    for key, value in tree.items():
        if isinstance(value, dict) and len(value) <= LEAVES:
            yield from flat(value, f"{above}{key}.")
        elif not isinstance(value, dict):
            yield f"{above}{key}", value


def device(name: str | None) -> torch.device:
    """The device called `name`; for None or "cuda" this process's own GPU."""
    import torch

    from svdit.distributed import default_device

    if name is None or (name == "cuda" and torch.cuda.is_available()):
        return default_device()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"there is no device {name!r} here ({reason}); leave --device out, or give cpu") from None


def checkpoint_path(args: argparse.Namespace) -> Path:
    """--ckpt, or the published weights, downloaded where they are not here yet."""
    from svdit.checkpoints.store import locate

    if args.ckpt is not None:
        return locate(args.ckpt)
    from svdit.checkpoints.hub import published_checkpoint

    if args.model not in (None, PUBLISHED):
        raise UserError(f"only {PUBLISHED} has published weights, {args.model} has none; give --ckpt PATH")
    return published_checkpoint(args.image_size or 256)


def load_checkpoint(args: argparse.Namespace, device: torch.device) -> Checkpoint:
    """The model of `add_model`'s flags, in eval mode; UserError where a flag contradicts the file."""
    from svdit.checkpoints.store import load_model, read_header

    path = checkpoint_path(args)
    claims = {} if args.num_classes is None else {"num_classes": args.num_classes}
    model = load_model(path, name=args.model, device=device, **claims)
    size = image_size(model)
    if args.image_size not in (None, size):
        raise UserError(f"--image-size is {args.image_size}, but {path} draws pictures of {size}×{size}; leave it out")
    header = read_header(path)
    name = (header or {}).get("name") or args.model or (PUBLISHED if args.ckpt is None else "")
    return Checkpoint(name, path, header, model)


def accelerated(model: DiT, args: argparse.Namespace) -> DiT:
    """The model as it runs fastest here, or as --backend says; a float model stays as it is."""
    from svdit.kernels import ops
    from svdit.runtime.accelerate import accelerate

    fast = accelerate(model, args.backend, debug=args.debug)
    device = model.pos_embed.device
    missing = ops.reasons(device)[{"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")]
    if fast is not model and args.backend == "auto" and missing:
        print(f"slower than it could be: {missing}", file=sys.stderr)
    return fast


def image_size(model: DiT) -> int:
    """The side of the model's pictures: four channels are a VAE's latents, eight times smaller."""
    return model.config.input_size * (LATENT_FACTOR if model.config.in_channels == LATENT_CHANNELS else 1)


def load_vae(name: str, model: DiT, device: torch.device, default: str) -> Autoencoder:
    """The autoencoder of `model`: for "auto" `default`, or none for a model of pixels (1 or 3 channels)."""
    from svdit.model.autoencoder import load_autoencoder

    channels = model.config.in_channels
    if channels not in (1, 3, LATENT_CHANNELS):
        raise UserError(f"a model of {channels} channels draws neither pixels (1 or 3) nor latents ({LATENT_CHANNELS})")
    pixels = channels != LATENT_CHANNELS
    if name == "auto":
        name = "none" if pixels else default
    if pixels != (name == "none"):
        kind, fit = ("pixels", "none") if pixels else ("latents", "ema or mse")
        raise UserError(f"--vae is {name}, but the model has {channels} channels, which are {kind}; give {fit}")
    return load_autoencoder(name, device)


@contextmanager
def progress(description: str, shown: bool = True) -> Iterator[Callable[[float, int], None]]:
    """A bar on stderr where that is a terminal, silence elsewhere; call it with (done, total)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
