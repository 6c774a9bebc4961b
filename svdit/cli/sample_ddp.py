"""`svdit generate`: many images into a folder and an .npz, on one or more processes; interrupted runs resume.

torchrun --nproc-per-node 8 sample_ddp.py --ckpt PATH --num-fid-samples 50000 --sample-dir samples
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.cli import measures, outputs, sampling, setup
from svdit.cli.arguments import Parser, batch, integer, keys, output, path, ratio
from svdit.cli.result import Result
from svdit.errors import UserError
from svdit.printing import note

if TYPE_CHECKING:
    import torch

    from svdit.evaluation.options import Options
    from svdit.model.dit import DiT

CFG_SCALE, VAE = 1.5, "ema"


def parser() -> Parser:
    """The options of `svdit generate`."""
    parser = Parser(
        "svdit generate",
        description="Sample many images into a folder and an .npz, on one process or under torchrun. "
        "Rerun the same command to resume.",
    )
    setup.add_model(parser)
    add = parser.add_argument
    add("--rank-ratio", type=ratio, metavar="R", help="rank ratio the checkpoint was quantized with; must match it")
    setup.add_speed(parser)
    sampling.add_sampling(parser, CFG_SCALE, VAE)
    add(
        "--num-fid-samples",
        type=integer(1, 10**7),
        default=50_000,
        metavar="N",
        help="number of images; default: %(default)s",
    )
    add(
        "--sample-dir",
        type=output,
        default=Path("samples"),
        metavar="DIR",
        help="writes DIR/000000.png, ..., DIR/manifest.json and DIR.npz; default: %(default)s",
    )
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument(
        "--tar",
        dest="sink",
        action="store_const",
        const="tar",
        default="png",
        help="write WebDataset shards of 1000 images, DIR/000000.tar, ..., instead of single files",
    )
    forms.add_argument(
        "--no-png", dest="sink", action="store_const", const="npz", help="write no image files, only DIR.npz"
    )
    forms.add_argument(
        "--evaluate",
        type=path,
        metavar="REAL",
        help="store no images, but compare them with real ones as svdit evaluate does; writes DIR/metrics.json",
    )
    measures.add(parser.add_argument_group("metrics, with --evaluate"))
    add(
        "--per-proc-batch-size",
        type=batch,
        default=32,
        metavar="B",
        help="images per process and batch; does not change the images; default: %(default)s",
    )
    setup.add_seed(parser, "--global-seed")
    add(
        "--label-policy",
        choices=keys("sampling/dataset.py", "LABEL_POLICIES"),
        help="random classes, or all classes equally often; default: those of --protocol, else random",
    )
    add(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        help="TF32 matrix products on a GPU; default, as published: on",
    )
    return parser


def run(args: argparse.Namespace) -> Result:
    """Load the model and generate this process's share."""
    from svdit.distributed import rank, session
    from svdit.evaluation.stream import Stream
    from svdit.files import creatable_folder
    from svdit.progress import progress
    from svdit.sampling.dataset import generate_dataset

    creatable_folder(args.sample_dir)
    device = setup.device(args.device)
    outputs.check_outside("--sample-dir", args.sample_dir, itself=False)
    options = evaluation_options(args, device)
    with session(device):
        if args.tf32 and device.type != "cuda":
            note("--tf32 has no effect: there is no GPU in use")
        tf32 = args.tf32 is not False and device.type == "cuda"
        set_tf32(tf32)
        check_rank_ratio(args)
        checkpoint = setup.load_checkpoint(args, device, to_pack=True)
        config, vae, label_policy, record = sampling.settings(args, checkpoint.model, CFG_SCALE)
        sampling.caching(args, checkpoint.model, config)
        model = setup.accelerated(checkpoint.model, args)
        autoencoder = sampling.load_vae(vae, model, device, VAE, checkpoint.path)
        sink = Stream(args.evaluate, measures.network(args, options), options) if options else args.sink
        with progress("generating", rank() == 0, "images") as tick:
            result = generate_dataset(
                model,
                args.sample_dir,
                args.num_fid_samples,
                config,
                autoencoder=autoencoder,
                seed=args.global_seed,
                batch_size=args.per_proc_batch_size,
                label_policy=label_policy,
                sink=sink,
                origin=origin(checkpoint, model, tf32) | record | {"command": args.command_line},
                progress=tick,
            )
    if options:
        return measures.result(result)
    folder, count = args.sample_dir.resolve(), args.num_fid_samples
    manifest = folder / "manifest.json"
    data = {"folder": folder, "npz": result, "manifest": manifest, "images": count, "storage": args.sink}
    places = [result] if args.sink == "npz" else [folder, result]
    return Result(data, [f"{count} images in {' and '.join(map(str, places))}"], places)


def evaluation_options(args: argparse.Namespace, device: "torch.device") -> "Options | None":
    """Those of --evaluate. Raises UserError for images that the outputs would be among, and an unwritable cache."""
    from svdit.files import writable_folder

    if args.evaluate is None:
        if unused := measures.passed(args):
            note(f"{', '.join(unused)} without effect: there is no --evaluate")
        return None
    inputs = [folder for folder in (args.evaluate, args.paired_dir) if folder]
    outputs.check_outside("--sample-dir", args.sample_dir, *inputs, itself=False)
    outputs.check_distinct("--sample-dir", args.sample_dir, *inputs)
    options = measures.options(args, batch_size=args.per_proc_batch_size, device=device)
    if options.cache and options.network_metrics:
        writable_folder(options.cache)
    return options


def set_tf32(allowed: bool) -> None:
    """Allow TF32 in CUDA matrix products and convolutions; other devices always use fp32."""
    import torch

    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed


def origin(checkpoint: setup.Checkpoint, model: "DiT", tf32: bool) -> dict[str, Any]:
    """The manifest's record of the model; a float model has no backend, one quantized elsewhere no settings."""
    from svdit.checkpoints.io import fingerprint
    from svdit.kernels import ops
    from svdit.runtime.accelerate import fallbacks
    from svdit.runtime.dit import FastDiT

    recorded = ((checkpoint.header or {}).get("provenance") or {}).get("quantization")
    return {
        "model": checkpoint.name,
        "checkpoint": checkpoint.path.name,
        "checkpoint_sha256": fingerprint(checkpoint.path),
        "quantization": recorded or ({"mode": "unrecorded"} if isinstance(model, FastDiT) else None),
        "backend": ops.describe(model.backend) if isinstance(model, FastDiT) else None,
        "fallbacks": ops.summary(fallbacks(model)) or None,
        **({"precision": "tf32"} if tf32 and model.pos_embed.dtype.itemsize == 4 else {}),
    }


def check_rank_ratio(args: argparse.Namespace) -> None:
    """Raises UserError unless every quantized layer of the checkpoint was made with --rank-ratio."""
    from svdit.checkpoints.store import read_header

    if args.rank_ratio is None:
        return
    problem = f"--rank-ratio is {args.rank_ratio:g}, but"
    if args.ckpt is None:
        raise UserError(f"{problem} the published weights are not quantized; pass --ckpt with a quantized checkpoint")
    layers = (read_header(args.ckpt) or {}).get("layers") or {}
    ratios = {spec.get("rank_ratio") for spec in layers.values()} - {None}
    if not layers:
        raise UserError(f"{problem} {args.ckpt} is not quantized; omit it, or pass a quantized checkpoint")
    if not ratios:
        raise UserError(f"{problem} {args.ckpt} was quantized without a rank ratio; omit it")
    if ratios != {args.rank_ratio}:
        actual = " and ".join(f"{ratio:g}" for ratio in sorted(ratios))
        raise UserError(f"{problem} {args.ckpt} was quantized with {actual}; omit it, or pass that checkpoint")
