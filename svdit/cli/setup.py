"""Options that several commands share: device, checkpoint, sampling, autoencoder.

Torch is imported inside the functions that need it, so `--help` stays fast. A checkpoint describes itself:
--model, --image-size and --num-classes are checked against it and never override it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from svdit.cli.arguments import integer, keys, many, natural, path, pixels, scale
from svdit.errors import UserError
from svdit.printing import note

if TYPE_CHECKING:
    import torch

    from svdit.kernels.layer import LinearSpec
    from svdit.kernels.ops import Shape
    from svdit.model.autoencoder import Autoencoder
    from svdit.model.dit import DiT
    from svdit.sampling.batch import SamplingConfig

CFG_CHANNELS = {"three": 3, "all": None}
PUBLISHED = "DiT-XL/2"
LATENT_CHANNELS, LATENT_FACTOR = 4, 8


class Checkpoint(NamedTuple):
    """A model and its file; `header` is None for files of other tools."""

    name: str
    path: Path
    header: dict[str, Any] | None
    model: DiT


def add_model(parser: argparse.ArgumentParser) -> None:
    """--ckpt, --model, --image-size, the options of `add_shape`, --device"""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add(
        "--ckpt",
        type=path,
        metavar="PATH",
        help="checkpoint file, or 'digits'; default: download the published DiT-XL/2",
    )
    add("--model", metavar="NAME", help="DiT-XL/2, SiT-B/4, ...; must match the checkpoint")
    add("--image-size", type=pixels, metavar="PIXELS", help="must match the checkpoint")
    add_shape(group)
    add_device(group)


def add_shape(group: argparse._ActionsContainer) -> None:
    """--family, --num-classes, --num-heads, --context-start, --latent-stats"""
    add = group.add_argument
    add(
        "--family",
        choices=keys("model/config.py", "FAMILIES"),
        help="for checkpoints whose tensors do not show it, such as SiT's, which are like DiT's",
    )
    add(
        "--num-classes",
        type=many,
        metavar="K",
        help="must match the checkpoint; as many as its label table has rows: no null class, so no guidance",
    )
    add("--num-heads", type=many, metavar="H", help="for checkpoints that do not record it and of no named size")
    add("--context-start", type=natural, metavar="BLOCK", help="the same, of JiT: the first block with class tokens")
    add(
        "--latent-stats",
        type=path,
        metavar="PATH",
        help="statistics of latents (latents_stats.pt); default: the checkpoint's, or those beside it",
    )


def claims(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of DiTConfig that options of `add_shape` passed."""
    values = {key: getattr(args, key) for key in ("family", "num_classes", "num_heads", "context_start")}
    return {key: value for key, value in values.items() if value is not None}


def add_device(group: argparse._ArgumentGroup) -> None:
    """--device"""
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...; default: cuda if available")


def add_seed(group: argparse._ActionsContainer, *names: str) -> None:
    """--seed, or the names given"""
    group.add_argument(*(names or ("--seed",)), type=natural, default=0, metavar="SEED", help="default: %(default)s")


def add_speed(parser: argparse.ArgumentParser) -> None:
    """--backend, --debug"""
    group = parser.add_argument_group("quantized layers")
    group.add_argument(
        "--backend",
        choices=["auto", *keys("kernels/ops.py", "BACKENDS")],
        help="default: $SVDIT_BACKEND, or the fastest one available",
    )
    group.add_argument("--debug", action="store_true", help="raise at the first layer whose input contains NaN or Inf")


def add_sampling(parser: argparse.ArgumentParser, cfg_scale: float, vae: str) -> None:
    """--sampler, --num-sampling-steps, --cfg-scale, --cfg-channels, --cfg-interval, --vae"""
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--sampler", default="ddpm", choices=keys("diffusion/samplers.py", "SAMPLERS"), help="default: %(default)s")
    add("--num-sampling-steps", default="250", metavar="STEPS", help="250, ddim50, ...; default: %(default)s")
    add(
        "--cfg-scale",
        type=scale,
        default=cfg_scale,
        metavar="SCALE",
        help="classifier-free guidance scale, 1 turns guidance off; default: %(default)s",
    )
    add("--cfg-channels", choices=CFG_CHANNELS, help="channels to guide; default, as published: three")
    add(
        "--cfg-interval",
        nargs=2,
        type=integer(0, 999),
        metavar=("FIRST", "LAST"),
        help="apply guidance only at timesteps FIRST to LAST (0 to 999), which is faster; default: at all timesteps",
    )
    add(
        "--vae",
        type=path,
        default="auto",
        metavar="NAME",
        help=f"ema, mse, a local folder, or none for pixel-space models; default for latent models: {vae}",
    )


def sampling_config(args: argparse.Namespace) -> SamplingConfig:
    """The settings of `add_sampling`'s options. Raises UserError for settings that cannot be sampled with."""
    from svdit.sampling.batch import SamplingConfig

    for option, passed in (("--cfg-channels", args.cfg_channels), ("--cfg-interval", args.cfg_interval)):
        if passed and args.cfg_scale == 1:
            note(f"{option} has no effect with --cfg-scale 1, which turns guidance off")
    channels, interval = CFG_CHANNELS[args.cfg_channels or "three"], args.cfg_interval and tuple(args.cfg_interval)
    return SamplingConfig(args.sampler, args.num_sampling_steps, args.cfg_scale, channels, interval)


def device(name: str | None) -> torch.device:
    """The device called `name`; for None and "cuda" the GPU of this process. Raises UserError if unavailable."""
    import torch

    from svdit.distributed import default_device

    if name is None or (name == "cuda" and torch.cuda.is_available()):
        return default_device()
    if not re.fullmatch(r"cpu(:0)?|cuda(:[0-9]{1,4})?", name):
        raise UserError(f"device {name!r} is not supported; choose cpu, cuda or cuda:1, or omit --device")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} is unavailable ({reason}); omit --device or choose cpu") from None


def checkpoint_path(args: argparse.Namespace) -> Path:
    """--ckpt, or the published weights, downloaded if missing. Raises UserError for a model without published ones."""
    from svdit.checkpoints.store import locate

    if args.ckpt is not None:
        return locate(args.ckpt)
    from svdit.checkpoints.hub import published_checkpoint

    if args.model not in (None, PUBLISHED):
        raise UserError(f"{args.model} has no published weights, only {PUBLISHED} has; pass --ckpt PATH")
    return published_checkpoint(args.image_size or 256)


def load_checkpoint(args: argparse.Namespace, device: torch.device) -> Checkpoint:
    """The model of `add_model`'s options, in eval mode. Raises UserError if an option contradicts the file."""
    from svdit.checkpoints.store import load_model, read_header

    path = checkpoint_path(args)
    model = load_model(path, name=args.model, device=device, latent_stats=args.latent_stats, **claims(args))
    size = image_size(model)
    if args.image_size not in (None, size):
        raise UserError(f"--image-size is {args.image_size}, but {path} generates {size}×{size} images; omit it")
    header = read_header(path)
    name = (header or {}).get("name") or args.model or (PUBLISHED if args.ckpt is None else "")
    return Checkpoint(name, path, header, model)


def accelerated(model: DiT, args: argparse.Namespace) -> DiT:
    """The model on the backend of --backend. A float model is returned unchanged, with a note if that was asked for."""
    from svdit.kernels import ops
    from svdit.runtime.accelerate import accelerate, fallbacks

    if args.backend:
        ops.choose(model.pos_embed.device, args.backend)  # raises for a float model too
    fast = accelerate(model, args.backend, debug=args.debug)
    if fast is model:
        ignored = [flag for flag, used in (("--backend", args.backend), ("--debug", args.debug)) if used]
        if ignored:
            note(f"{' and '.join(ignored)} without effect: the checkpoint is not quantized")
        return model
    device = model.pos_embed.device
    reason = ops.reasons(device)[{"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")]
    if args.backend in (None, "auto") and reason:
        note(f"the fastest backend is unavailable: {reason}")
    if summary := ops.summary(fallbacks(fast)):
        note(summary)
    return fast


def unsupported(layers: Mapping[str, tuple[LinearSpec, Shape]], backend: str, device: torch.device) -> str:
    """The layers, by name, that `backend` does not support: "N of M layers in fp32: reason"; "" for none."""
    from svdit.kernels import ops

    return ops.summary({name: ops.unsupported(*layer, backend, device) for name, layer in layers.items()})


def image_size(model: DiT) -> int:
    """Side of the model's images in pixels; four channels are latents of a VAE, eight times smaller."""
    return model.config.input_size * (LATENT_FACTOR if model.config.in_channels == LATENT_CHANNELS else 1)


def load_vae(name: str, model: DiT, device: torch.device, default: str, checkpoint: Path | None = None) -> Autoencoder:
    """The autoencoder for `model`: for "auto" that of the pipeline of `checkpoint`, if it has one, or `default`.

    None in pixel space (1 or 3 channels). Raises UserError for one that does not match the model's channels.
    """
    from svdit.checkpoints.folders import vae_beside
    from svdit.model.autoencoder import load_autoencoder

    channels = model.config.in_channels
    if channels not in (1, 3, LATENT_CHANNELS):
        raise UserError(f"the model has {channels} channels; supported are 1 or 3 (pixels) and 4 (latents)")
    pixels = channels != LATENT_CHANNELS
    if name == "auto":
        own = vae_beside(checkpoint) if checkpoint else None
        name = "none" if pixels else str(own or default)
    if pixels != (name == "none"):
        space, fit = ("pixels", "none") if pixels else ("latents", "ema or mse")
        raise UserError(f"--vae is {name}, but the model has {channels} channels ({space}); choose {fit}")
    return load_autoencoder(name, device)
