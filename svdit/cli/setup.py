"""Options that several commands share: device and checkpoint.

Torch is imported inside the functions that need it, so `--help` stays fast. A checkpoint describes itself:
--model, --image-size and --num-classes are checked against it and never override it.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from svdit.cli.arguments import keys, many, natural, path, pixels
from svdit.errors import UserError
from svdit.printing import note

if TYPE_CHECKING:
    import torch

    from svdit.kernels.layer import LinearSpec
    from svdit.kernels.ops import Shape
    from svdit.model.dit import DiT

PUBLISHED = "DiT-XL/2"
FACTORS = {1: 1, 3: 1, 4: 8, 32: 16}  # pixels per side of a latent, by channels: Stable Diffusion's VAE, and VA-VAE


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
        help="checkpoint file, or digits, digits-sit, digits-jit; default: download the published DiT-XL/2",
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


def add_device(group: argparse._ActionsContainer) -> None:
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


def device(name: str | None) -> torch.device:
    """The device called `name`; for None and "cuda" the GPU of this process. Raises UserError if unavailable."""
    from svdit.distributed import named_device

    return named_device(name)


def checkpoint_path(args: argparse.Namespace) -> Path:
    """--ckpt, or the published weights, downloaded if missing. Raises UserError for a model without published ones."""
    from svdit.checkpoints.store import locate

    if args.ckpt is not None:
        return locate(args.ckpt)
    from svdit.checkpoints.hub import published_checkpoint

    others = (args.model, PUBLISHED), (args.family, "dit"), (getattr(args, "protocol", None), "dit-250")
    for given, published in others:
        if given not in (None, published):
            raise UserError(f"only the published {PUBLISHED} is downloaded, not {given}; pass --ckpt PATH")
    return published_checkpoint(args.image_size or 256)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection: while torch is imported and a model built, it finds nothing and takes 0.3 s."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # what was made is old now, so that the next collection does not walk it
        if enabled:
            gc.enable()


def read_ahead(args: argparse.Namespace) -> None:
    """Begin to read and hash the file of --ckpt, before torch is imported."""
    from svdit.storage import ahead

    if args.ckpt is not None:
        ahead.start(Path(args.ckpt))


def load_checkpoint(args: argparse.Namespace, device: torch.device, to_pack: bool = False) -> Checkpoint:
    """The model of `add_model`'s options, in eval mode. `to_pack`: `accelerated` is called next, and copies its layers.

    Raises UserError if an option contradicts the file.
    """
    from svdit.checkpoints.store import load_model, read_header

    path = checkpoint_path(args)
    options = {"name": args.model, "latent_stats": args.latent_stats, **claims(args)}
    header = read_header(path)
    mapped = to_pack and bool((header or {}).get("layers")) and copies(args, device)
    model = load_model(path, device=device, mapped=mapped, **options)
    size = image_size(model)
    if size and args.image_size not in (None, size):
        raise UserError(f"--image-size is {args.image_size}, but {path} generates {size}×{size} images; omit it")
    name = (header or {}).get("name") or args.model or (PUBLISHED if args.ckpt is None else "")
    return Checkpoint(name, path, header, model)


def copies(args: argparse.Namespace, device: torch.device) -> bool:
    """Whether the backend of --backend keeps nothing of a layer with quantized activations, as the C kernels do."""
    from svdit.kernels import ops

    try:
        return ops.choose(device, args.backend) == "cpu"
    except UserError:  # `accelerated` raises it where the model is quantized
        return False


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


def image_size(model: DiT) -> int | None:
    """Side of the model's images in pixels; None for latents of an autoencoder of another number of channels."""
    factor = FACTORS.get(model.config.in_channels)
    return factor and model.config.input_size * factor
