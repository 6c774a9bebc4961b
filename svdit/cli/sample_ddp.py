"""`svdit generate`: many pictures into a folder and an .npz, alone or under torchrun; a stopped run continues.

torchrun --nproc-per-node 8 sample_ddp.py --ckpt PATH --num-fid-samples 50000 --sample-dir samples
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.cli import setup
from svdit.errors import UserError

if TYPE_CHECKING:
    from svdit.model.dit import DiT

VAE = "ema"


def parser() -> argparse.ArgumentParser:
    """The flags of `svdit generate`."""
    parser = argparse.ArgumentParser(
        "svdit generate", description="Draw many pictures into a folder and an .npz, alone or under torchrun."
    )
    setup.add_model(parser)
    parser.add_argument(
        "--rank-ratio",
        type=float,
        metavar="R",
        help="the rank ratio the checkpoint was quantized with; checked against it",
    )
    setup.add_speed(parser)
    setup.add_sampling(parser, cfg_scale=1.5, vae=VAE)
    parser.add_argument(
        "--num-fid-samples", type=setup.positive, default=50_000, metavar="N", help="pictures; default: 50000"
    )
    parser.add_argument(
        "--sample-dir",
        type=Path,
        default=Path("samples"),
        metavar="DIR",
        help="gets DIR/000000.png, ..., DIR/manifest.json and DIR.npz; default: samples",
    )
    parser.add_argument(
        "--per-proc-batch-size", type=setup.positive, default=32, metavar="B", help="changes no picture; default: 32"
    )
    parser.add_argument("--global-seed", type=setup.seed, default=0, metavar="SEED", help="default: 0")
    parser.add_argument(
        "--label-policy",
        default="random",
        choices=["random", "balanced"],
        help="how classes are chosen; default: random",
    )
    parser.add_argument(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="TF32 products on a GPU; default, as published: on",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Load, check, draw this process's share; the first process writes the .npz and says where everything is."""
    from svdit.distributed import rank, session
    from svdit.sampling.dataset import generate_dataset

    config = setup.sampling_config(args)
    device = setup.device(args.device)
    with session(device):
        tf32 = args.tf32 and device.type == "cuda"
        set_tf32(tf32)
        check_rank_ratio(args)
        checkpoint = setup.load_checkpoint(args, device)
        model = setup.accelerated(checkpoint.model, args)
        autoencoder = setup.load_vae(args.vae, model, device, VAE)
        first = rank() == 0
        with setup.progress("generating", shown=first) as tick:
            npz = generate_dataset(
                model,
                autoencoder,
                config,
                folder=args.sample_dir,
                count=args.num_fid_samples,
                seed=args.global_seed,
                batch_size=args.per_proc_batch_size,
                label_policy=args.label_policy,
                origin=origin(checkpoint, model, tf32) if first else None,
                progress=tick,
            )
        if first:
            print(f"{args.num_fid_samples} pictures in {args.sample_dir} and {npz}")


def set_tf32(allowed: bool) -> None:
    """Let CUDA products and convolutions round their inputs to TF32, or not; other devices never do."""
    import torch

    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed


def origin(checkpoint: setup.Checkpoint, model: "DiT", tf32: bool) -> dict[str, Any]:
    """What the manifest says of the model; a float model has no backend."""
    from svdit.files import sha256
    from svdit.kernels import ops
    from svdit.runtime.dit import FastDiT

    return {
        "model": checkpoint.name,
        "checkpoint": checkpoint.path.name,
        "checkpoint_sha256": sha256(checkpoint.path),
        "quantization": ((checkpoint.header or {}).get("provenance") or {}).get("quantization"),
        "backend": ops.describe(model.backend) if isinstance(model, FastDiT) else None,
        "precision": "tf32" if tf32 else "float32",
    }


def check_rank_ratio(args: argparse.Namespace) -> None:
    """--rank-ratio must be the one that every quantized layer of the checkpoint was made with."""
    from svdit.checkpoints.store import read_header

    if args.rank_ratio is None:
        return
    asked = f"--rank-ratio is {args.rank_ratio:g}, but"
    if args.ckpt is None:
        raise UserError(f"{asked} the published weights are not quantized; give --ckpt with a file of quantize_ptq.py")
    layers = (read_header(args.ckpt) or {}).get("layers") or {}
    ratios = {spec.get("rank_ratio") for spec in layers.values()} - {None}
    if not layers:
        raise UserError(f"{asked} {args.ckpt} is not quantized; leave it out, or give a file of quantize_ptq.py")
    if not ratios:
        raise UserError(f"{asked} {args.ckpt} was quantized without a rank ratio; leave it out")
    if ratios != {args.rank_ratio}:
        made = " and ".join(f"{ratio:g}" for ratio in sorted(ratios))
        raise UserError(f"{asked} {args.ckpt} was quantized with {made}; leave it out, or give that checkpoint")
