"""`svdit quantize`: from a checkpoint to a smaller one and a report: bytes and errors per layer, time, figures."""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.cli import outputs, setup
from svdit.cli.arguments import Parser, above_0, decibels, integer, many, natural, ratio, scale
from svdit.cli.quantize_plan import planned
from svdit.cli.quantize_settings import ACTS, AUTO, QuantizeSettings
from svdit.cli.result import Result
from svdit.errors import UserError
from svdit.printing import note, warn
from svdit.quant.config import ADALN, RECIPES

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from torch import nn

    from svdit.model.dit import DiT
    from svdit.quant.budget import Plan
    from svdit.quant.observe import ForwardLoop
    from svdit.quant.report import QuantReport

DEFAULT = QuantizeSettings()


def parser() -> Parser:
    """The options of `svdit quantize`; those of QuantizeSettings have no value unless given."""
    parser = Parser(
        "svdit quantize",
        description="Quantize a checkpoint with SVDQuant: by --preset, or with --rank-ratio to the truncated SVD of "
        "every linear layer. Rerun the same command to resume; under torchrun, processes share the layers. A pipeline "
        "of diffusers has other options: see `svdit quantize --pipeline FOLDER --help`.",
    )
    setup.add_model(parser)
    add = parser.add_argument
    outputs.add_output(parser, "quantized_model.safetensors", ".safetensors or .pt; ")
    options: Any = {"dest": "figures", "action": "store_false", "default": argparse.SUPPRESS}
    add("--no-figures", help="omit figures and their measurements", **options)
    add_method(parser)
    add_calibration(parser)
    return parser


def add_method(parser: Parser) -> None:
    """The options that decide how each layer is stored."""
    add = parser.add_argument_group("method", argument_default=argparse.SUPPRESS).add_argument
    add(
        "--preset",
        choices=(AUTO, *RECIPES),
        metavar="NAME",
        help=f"{', '.join(RECIPES)}; or {AUTO}, with a target: compare images of several choices; default: "
        f"{DEFAULT.preset}",
    )
    add(
        "--rank-ratio", type=ratio, metavar="R", help="rank of the truncated SVDs, relative to the full rank; no preset"
    )
    add(
        "--num-bits",
        type=integer(2, 8),
        metavar="BITS",
        help="bits of the weights (with --rank-ratio: of the two factors), 2 to 8; default: the preset's, or 8",
    )
    add("--act-bits", type=natural, choices=ACTS, help="bits of the activations; 16: do not quantize them")
    add("--group-size", type=natural, metavar="G", help="weights per scale; 0: one scale per row")
    add("--rank", type=natural, metavar="R", help="rank of the low-rank branch; default: the preset's, 16 or 32")
    add("--factors", choices=("bf16", "int8"), help=f"storage of the low-rank branch; default: {DEFAULT.factors}")
    add("--whiten", action="store_true", help="with --rank-ratio: activation-aware SVD")
    add("--adaln", choices=ADALN, help=f"weights of the adaLN layers; default: {DEFAULT.adaln}")
    add("--target-size", type=above_0, metavar="MB", help="choose bits and rank per layer for a file of at most MB")
    add("--target-sqnr", type=decibels, metavar="DB", help="choose the smallest file with this predicted output SQNR")
    add("--target-psnr", type=decibels, metavar="DB", help="choose the smallest file whose images have this PSNR")
    add("--skip", action="append", metavar="PATTERN", help="keep matching layers, '*.attn.*' for example; repeatable")


def add_calibration(parser: Parser) -> None:
    """The options of the calibration set, which the model samples itself."""
    add = parser.add_argument_group("calibration", argument_default=argparse.SUPPRESS).add_argument
    add("--calib-images", type=many, metavar="N", help="default: as many as the widest layer needs")
    add("--calib-steps", type=integer(1, 1000), metavar="S", help="sampling steps; default: at most 25")
    add("--cfg-scale", type=scale, metavar="SCALE", help="guidance scale; default: 1.5, or the family's")
    add("--seed", type=natural, help=f"default: {DEFAULT.seed}")
    add(
        "--max-memory",
        type=above_0,
        metavar="GB",
        help=f"memory for layer statistics; less needs more calibration runs; default: {DEFAULT.max_memory:g}",
    )


def run(args: argparse.Namespace) -> Result | None:
    """Load, quantize, save, report; the result is the first process's.

    Raises UserError for options that contradict each other or the checkpoint.
    """
    from svdit import distributed
    from svdit.checkpoints.io import fingerprint
    from svdit.checkpoints.store import save_model
    from svdit.kernels import ops
    from svdit.quant.select import select
    from svdit.sampling.batch import check_guidance
    from svdit.sampling.calibration import calibration_sampling

    settings = QuantizeSettings.of(args)
    outputs.output_file(args, ".safetensors", ".pt", beside=(".report.json", ".report"))
    device = setup.device(args.device)
    backend = ops.choose(device)
    with distributed.session(device), distributed.reserved(args.output, args.output.with_suffix(".report.json")):
        for sentence in settings.unused():
            note(sentence)
        source = setup.load_checkpoint(args, device)
        outputs.check_distinct("--output", args.output, source.path)
        if source.model.cache_plan:
            note("the cache plan is omitted: it is for full precision; run `svdit cache` on the output")
            source.model.cache_plan = None
        config = source.model.config
        scale = calibration_sampling(config, 1, settings.cfg_scale).cfg_scale
        last_block = config.depth - 1 if config.prediction == "x0" else None
        settings = replace(settings, cfg_scale=scale, last_block=last_block)
        if settings.calibrates or settings.figures:
            check_guidance(source.model, scale)
        select(source.model, settings.config)  # before calibration, errors in patterns and shapes
        record, digest = settings.record(), fingerprint(source.path)
        work = args.output.with_name(f"{args.output.name}.partial")
        report, plan = quantize(settings, source.model, record, digest, work)
        if distributed.rank() != 0:
            return None
        original = setup.load_checkpoint(args, device).model if settings.figures else None
        measured = measure(settings, source.model, original, report, plan) if original else None
        record["weight_errors"] = {line.name: line.weight_error for line in report.layers}
        provenance = {"source": {"file": source.path.name, "sha256": digest}, "quantization": record}
        save_model(source.model, args.output, name=source.name, provenance=provenance)
        fallbacks = unsupported(source.model, backend, device)
        header = {
            **outputs.circumstances(args.command_line, device),
            **{"model": source.name, "source": provenance["source"]},
            **{"settings": record, "kept": kept(source.model)},
            **{"backend": ops.describe(backend), "fallbacks": fallbacks or None},
        }
        written = write_report(args.output, report, header, measured)
        remove(work)
    warnings = [*report.warnings, *filter(None, [fallbacks])]
    for warning in warnings:
        warn(warning)
    paths = {"output": args.output, **written}
    shown = [path for path in paths.values() if path]
    return Result({**paths, **report.to_dict(), "warnings": warnings}, [*summary(report), *shown], shown)


def quantize(
    settings: QuantizeSettings, model: "DiT", record: dict[str, Any], digest: str, work: Path
) -> "tuple[QuantReport, Plan | None]":
    """Plan, calibrate and quantize `model` in place; finished layers are kept in `work`."""
    from svdit import __version__, distributed
    from svdit.progress import progress
    from svdit.quant.quantize import quantize_

    loop = calibration(settings, model, record)
    start = time.perf_counter()
    plan = planned(settings, model, loop, record) if loop else None
    planning = time.perf_counter() - start
    with progress("quantizing", distributed.rank() == 0, "layers") as tick:
        report = quantize_(
            model,
            plan.config if plan else settings.config,
            loop,
            max_memory=settings.max_memory * 1e9,
            work_dir=work,
            statistics=plan.statistics if plan else None,
            run_id=json.dumps([__version__, digest, record, asdict(model.config)]),  # which options complete
            progress=tick,
        )
    if plan:
        report.add_seconds(plan=planning)
    return report, plan


def unsupported(model: "DiT", backend: str, device: "torch.device") -> str:
    """The layers that `backend` does not support, as a sentence; "" for none."""
    from svdit.quant.linear import quantized_layers

    layers = quantized_layers(model).items()
    shapes = {name: (layer.spec, (layer.out_features, layer.in_features)) for name, layer in layers}
    return setup.unsupported(shapes, backend, device)


def kept(model: "nn.Module") -> list[str]:
    """The layers with weights that are not quantized."""
    from torch import nn

    kinds = nn.Linear, nn.Embedding, nn.modules.conv._ConvNd
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def calibration(settings: QuantizeSettings, model: "DiT", record: dict[str, Any]) -> "ForwardLoop | None":
    """The forward loop, recorded in `record`; None if nothing is calibrated."""
    from svdit.distributed import rank
    from svdit.progress import progress
    from svdit.sampling.calibration import calibration_loop, calibration_sampling, calibration_size

    if not settings.calibrates:
        return None
    images, steps = calibration_size(model, settings.calib_images, settings.calib_steps)
    options: dict[str, Any] = {"images": images, "steps": steps, "cfg_scale": settings.cfg_scale, "seed": settings.seed}
    walk = calibration_sampling(model.config, steps, settings.cfg_scale)
    record["calibration"] = {"sampler": walk.sampler, **options}
    if walk.cfg_interval:
        record["calibration"]["cfg_interval"] = walk.cfg_interval

    def loop(model: "nn.Module") -> None:
        with progress("calibrating", rank() == 0, "steps") as tick:
            calibration_loop(**options, progress=tick)(model)

    return loop


def measure(
    settings: QuantizeSettings, model: "DiT", original: "DiT", report: "QuantReport", plan: "Plan | None"
) -> dict[str, Any]:
    """The numbers behind the figures, as JSON."""
    from svdit.report import diagnose

    measured = diagnose.measure(model, original, report.layers, settings.cfg_scale, settings.seed)
    if plan:
        measured |= {"curve": diagnose.thinned(plan.curve), "chosen": (plan.nbytes, plan.sqnr), "uniform": plan.uniform}
    return measured


def write_report(
    output: Path, report: "QuantReport", header: dict[str, Any], measured: dict[str, Any] | None
) -> dict[str, Path | None]:
    """Write the report as JSON and the figures as PNG beside the checkpoint; returns their paths."""
    from svdit.files import atomic_path
    from svdit.pictures import setting, subject
    from svdit.report.figures import draw

    path = output.with_suffix(".report.json")
    with atomic_path(path) as temporary:
        content = {**header, **report.to_dict(), "measured": measured}
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    if measured:
        try:
            model = header["model"] or header["source"]["file"]
            about = subject(model, setting(header["settings"]), day=header["date"])
            draw(output.with_suffix(".report"), report.layers, measured, about)
            return {"report": path, "figures": output.with_suffix(".report")}
        except UserError as error:
            note(f"no figures: {error}")
    return {"report": path, "figures": None}


def remove(folder: Path) -> None:
    """Delete the finished layers of a run that is complete."""
    from svdit.files import remove_empty

    for file in folder.glob("*.safetensors"):
        file.unlink()
    remove_empty(folder)


def summary(report: "QuantReport") -> "tuple[Table, str]":
    """The table of layers, and the totals."""
    from svdit.report.tables import layer_table

    seconds = ", ".join(f"{phase} {time:.1f} s" for phase, time in report.seconds.items())
    return layer_table(report.layers), (
        f"tensors: {report.bytes_before / 1e6:.2f} MB before, {report.bytes_after / 1e6:.2f} MB after "
        f"({report.bytes_before / report.bytes_after:.2f}× smaller); {seconds}"
    )
