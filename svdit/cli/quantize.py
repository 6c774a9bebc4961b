"""`svdit quantize`: a checkpoint to a smaller one, with a report of what was done to each layer and what it cost."""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.cli import setup
from svdit.errors import UserError

if TYPE_CHECKING:
    from svdit.quant.budget import Plan
    from svdit.quant.config import QuantConfig, Recipe
    from svdit.quant.report import QuantReport

PRESETS = (
    "w8a8", "w4a8", "w4a8-channel", "w4a4", "w4a16", "w8a16", "fp8", "nvfp4", "mxfp4",
    "svdquant", "svdquant-w4a4", "rtn", "smoothquant", "gptq", "qera",
)  # fmt: skip
LOW_BIT = {"w8a8": "w4a8", "w8a16": "w4a16"}  # which preset --num-bits 4 and less begin with


def parser() -> argparse.ArgumentParser:
    """The flags of `svdit quantize`."""
    parser = argparse.ArgumentParser(
        "svdit quantize",
        description="Quantize a DiT: SVDQuant by --preset, or with --rank-ratio the truncated SVD of every linear.",
    )
    setup.add_model(parser)
    parser.add_argument("--output", type=Path, default=Path("quantized_model.safetensors"), help=".safetensors or .pt")
    what = parser.add_argument_group("what")
    what.add_argument("--preset", default="w8a8", choices=PRESETS, metavar="NAME", help=", ".join(PRESETS))
    what.add_argument("--rank-ratio", type=float, help="no preset: every linear becomes its SVD of that relative rank")
    what.add_argument(
        "--num-bits", type=int, metavar="BITS", help="of the weights, or with --rank-ratio the factors: 2-8"
    )
    what.add_argument("--act-bits", type=int, choices=(4, 8, 16), help="of the activations; 16 leaves them alone")
    what.add_argument("--group-size", type=int, metavar="G", help="weights that share a scale; 0: a whole row")
    what.add_argument("--rank", type=int, metavar="R", help="of the low-rank branch; default 32, with 8-bit weights 16")
    what.add_argument("--factors", choices=("bf16", "int8"), default="bf16", help="how the branch is stored")
    what.add_argument("--whiten", action="store_true", help="with --rank-ratio: weigh the SVD by the layers' inputs")
    what.add_argument("--adaln", choices=("int8", "int4", "fp16"), default="int8", help="adaLN weights; default int8")
    what.add_argument(
        "--target-size", type=float, metavar="MB", help="choose bits and ranks for a file of at most that"
    )
    what.add_argument("--target-sqnr", type=float, metavar="DB", help="or the smallest file of that predicted quality")
    what.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="leave these layers alone")
    parser.add_argument(
        "--no-figures", dest="figures", action="store_false", help="leave out the report's pictures and measurements"
    )
    how = parser.add_argument_group("calibration")
    how.add_argument(
        "--calib-images", type=setup.positive, metavar="N", help="default: as many as the widest layer needs"
    )
    how.add_argument("--calib-steps", type=setup.positive, metavar="S", help="DDIM steps; default: at most 25")
    how.add_argument("--cfg-scale", type=float, default=1.5, help="guidance during calibration; default 1.5")
    how.add_argument("--seed", type=setup.seed, default=0, help="default 0")
    how.add_argument("--max-memory", type=float, default=8.0, metavar="GB", help="for statistics; default 8")
    return parser


def run(args: argparse.Namespace) -> None:
    """Load, quantize, save, report."""
    from svdit import distributed
    from svdit.checkpoints.store import save_model
    from svdit.files import sha256, writable_folder
    from svdit.quant.quantize import quantize_

    if args.output.suffix not in (".pt", ".safetensors"):
        raise UserError(f"--output is {args.output}; give a name that ends in .safetensors or .pt")
    config, settings = configuration(args)
    writable_folder(args.output.parent)
    device = setup.device(args.device)
    with distributed.session(device):
        source = setup.load_checkpoint(args, device)
        digest = sha256(source.path)
        loop = calibration(args, source.model, settings)
        plan = planned(args, source.model, config, loop) if args.target_size or args.target_sqnr else None
        if plan:
            config = plan.config
            settings["plan"] = {"target_mb": args.target_size, "target_sqnr": args.target_sqnr, "sqnr": plan.sqnr}
        work = args.output.with_name(f"{args.output.name}.partial")
        with setup.progress("calibrating and quantizing") as tick:
            report = quantize_(
                source.model,
                config,
                loop,
                max_memory=args.max_memory * 1e9,
                work_dir=work,
                statistics=plan.statistics if plan else None,
                run_id=json.dumps([digest, settings]),
                progress=tick,
            )
        if distributed.rank() == 0:
            numbers = measured(args, source.model, device, report, plan) if args.figures else None
            settings["weight_errors"] = {line.name: line.weight_error for line in report.layers}
            provenance = {"source": {"file": source.path.name, "sha256": digest}, "quantization": settings}
            save_model(source.model, args.output, name=source.name, provenance=provenance)
            remove(work)
            finish(args, report, settings, numbers)


def configuration(args: argparse.Namespace) -> tuple["QuantConfig", dict[str, Any]]:
    """What to do with which layer, and the same as JSON for the file's header."""
    from svdit.quant.config import dit_config, rank_ratio_config

    if args.rank_ratio is not None:
        bits = 8 if args.num_bits is None else args.num_bits
        settings = {"mode": "rank_ratio", "rank_ratio": args.rank_ratio, "num_bits": bits, "whiten": args.whiten}
        return rank_ratio_config(args.rank_ratio, bits, args.whiten, tuple(args.skip)), settings
    if args.whiten:
        raise UserError("--whiten belongs to --rank-ratio; give one, or leave it out")
    if args.target_size and args.target_sqnr:
        raise UserError("--target-size and --target-sqnr exclude each other; give one")
    recipe = recipe_of(args)
    settings = {"mode": "preset", "preset": args.preset, "adaln": args.adaln, "skip": args.skip}
    return dit_config(recipe, args.adaln, tuple(args.skip)), {**settings, "recipe": asdict(recipe)}


def recipe_of(args: argparse.Namespace) -> "Recipe":
    """The preset's recipe with what the flags change."""
    from svdit.kernels.formats import ACT_FORMATS, Format, ScaleType
    from svdit.quant.config import recipe_for

    low = args.num_bits is not None and args.num_bits <= 4
    recipe = recipe_for(LOW_BIT.get(args.preset, args.preset) if low else args.preset)
    if args.rank is not None:
        recipe = replace(recipe, rank=args.rank)
    if args.factors == "int8":
        recipe = replace(recipe, factors=Format(8))
    if args.num_bits is not None or args.group_size is not None:
        assert recipe.weight is not None
        bits = recipe.weight.bits if args.num_bits is None else args.num_bits
        group = (0 if bits == 8 else recipe.weight.group or 64) if args.group_size is None else args.group_size
        scale: ScaleType = "fp32" if not group else "int8" if bits <= 4 else "bf16"
        recipe = replace(recipe, weight=Format(bits, group, scale, "symmetric" if bits == 8 else "full"))
    if args.act_bits is not None:
        recipe = replace(recipe, act={4: ACT_FORMATS["int4"], 8: ACT_FORMATS["int8"], 16: None}[args.act_bits])
    return recipe


def calibration(args: argparse.Namespace, model: Any, settings: dict[str, Any]) -> Any:
    """The forward loop, and its record in `settings`; None where nothing is calibrated."""
    from svdit.sampling.calibration import calibration_loop, calibration_size

    if settings["mode"] == "rank_ratio" and not settings["whiten"]:
        return None
    images, steps = calibration_size(model, args.calib_images, args.calib_steps)
    choices = {"images": images, "steps": steps, "cfg_scale": args.cfg_scale, "seed": args.seed}
    settings["calibration"] = {"sampler": "ddim", **choices}
    return calibration_loop(**choices)


def planned(args: argparse.Namespace, model: Any, config: "QuantConfig", loop: Any) -> "Plan":
    """Bits and rank for every layer by --target-size or --target-sqnr, and the curve they were taken from."""
    from svdit.quant.budget import plan_

    target = None if args.target_size is None else round(args.target_size * 1e6)
    return plan_(model, config, loop, target_bytes=target, target_sqnr=args.target_sqnr)


def measured(
    args: argparse.Namespace, model: Any, device: Any, report: "QuantReport", plan: "Plan | None"
) -> dict[str, Any]:
    """What the pictures show, as JSON."""
    from svdit.report import diagnose

    original = setup.load_checkpoint(args, device).model
    numbers = diagnose.measure(model, original, report.layers, args.cfg_scale, args.seed)
    if plan:
        numbers |= {"curve": diagnose.thinned(plan.curve), "chosen": (plan.nbytes, plan.sqnr)}
    return numbers


def remove(folder: Path) -> None:
    """Delete the solved layers of a finished run."""
    for file in folder.glob("*.safetensors"):
        file.unlink()
    if folder.is_dir():
        folder.rmdir()


def finish(
    args: argparse.Namespace, report: "QuantReport", settings: dict[str, Any], numbers: dict[str, Any] | None
) -> None:
    """Print the table, and write the same and the measurements as JSON and pictures beside the checkpoint."""
    from svdit.files import atomic_path
    from svdit.report.figures import draw
    from svdit.report.tables import console, layer_table

    out = console()
    out.print(layer_table(report.layers))
    out.print(
        f"{report.bytes_before / 1e6:.2f} MB before, {report.bytes_after / 1e6:.2f} MB after "
        f"({report.bytes_before / report.bytes_after:.2f}×); "
        + ", ".join(f"{k} {v:.1f} s" for k, v in report.seconds.items())
    )
    for warning in report.warnings:
        out.print(f"[yellow]warning:[/] {warning}")
    path = args.output.with_suffix(".report.json")
    with atomic_path(path) as temporary:
        content = {"settings": settings, **report.to_dict(), "measured": numbers}
        temporary.write_text(json.dumps(content, indent=1))
    if numbers:
        draw(args.output.with_suffix(".report"), report.layers, numbers)
    out.print(f"{args.output}  {path}" + (f"  {path.with_suffix('')}/*.png" if numbers else ""), soft_wrap=True)
