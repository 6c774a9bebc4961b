"""`svdit quantize --pipeline FOLDER`: a transformer of a diffusers pipeline, calibrated by running the pipeline.

The output is a whole pipeline: other components are copied. Calls of the transformer are recorded once to
OUTPUT.partial, with the images in full precision and finished layers, so an interrupted run resumes.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.cli import outputs, setup
from svdit.cli.arguments import Parser, above_0, integer, many, natural, output, path
from svdit.cli.result import Result
from svdit.errors import UserError
from svdit.printing import warn
from svdit.quant.config import ADALN, RECIPES

if TYPE_CHECKING:
    from rich.table import Table

    from svdit.integrations.pipelines import Sampler
    from svdit.quant.report import QuantReport


def parser() -> Parser:
    """The options of `svdit quantize --pipeline`."""
    parser = Parser(
        "svdit quantize",
        description="Quantize the transformer of a diffusers pipeline. The pipeline itself generates the calibration "
        "set. Rerun the same command to resume. The output loads with DiffusionPipeline.from_pretrained after `import "
        "svdit.integrations.diffusers`.",
    )
    add = parser.add_argument
    add(
        "--pipeline", type=path, required=True, metavar="FOLDER", help="with a model_index.json, or a cached repository"
    )
    add("--component", metavar="NAME", help="default: transformer, or unet")
    add("--variant", metavar="NAME", help="variant of the weights, fp16 for example; default: the only one")
    add("--output", type=output, required=True, metavar="FOLDER", help="new folder of the quantized pipeline")
    setup.add_device(parser)
    method = parser.add_argument_group("method").add_argument
    method("--preset", choices=RECIPES, default="w8a8", metavar="NAME", help=f"{', '.join(RECIPES)}; default: w8a8")
    method("--adaln", choices=ADALN, default="int8", help="weights of the blocks' modulation; default: %(default)s")
    method("--skip", action="append", default=[], metavar="PATTERN", help="keep matching layers; repeatable")
    calibration = parser.add_argument_group("calibration").add_argument
    calibration(
        "--prompts", type=path, metavar="FILE", help="a prompt, or class label, per line; default: 16 of svdit's"
    )
    calibration("--call", nargs="+", default=[], metavar="NAME=VALUE", help="options of the pipeline: height=512 …")
    calibration("--calib-images", type=many, default=16, metavar="N", help="default: %(default)s")
    calibration("--calib-calls", type=many, default=128, metavar="N", help="calls that are kept; default: %(default)s")
    calibration("--images", type=integer(0, 64), default=4, metavar="N", help="images to compare; default: %(default)s")
    calibration("--seed", type=natural, default=0, metavar="SEED", help="default: %(default)s")
    calibration("--max-memory", type=above_0, default=8.0, metavar="GB", help="for statistics; default: %(default)g")
    return parser


def run(args: argparse.Namespace) -> Result:
    """Load, record, quantize, save, compare, report.

    Raises UserError for folders that are no pipeline, and for options that do not fit it.
    """
    from svdit import distributed
    from svdit.checkpoints.io import fingerprint
    from svdit.cli.pipeline_job import Job
    from svdit.files import writable_folder
    from svdit.integrations.folders import PipelineFolder
    from svdit.integrations.pipelines import Sampler, load
    from svdit.integrations.rules import plan_for

    if args.output.exists():
        raise UserError(f"--output is {args.output}, which exists; choose a new folder, or delete it")
    folder = PipelineFolder.at(args.pipeline)
    component = folder.component(args.component)
    variant = folder.variant(component, args.variant)
    options, lines = call_options(args.call), prompt_lines(args.prompts)
    device = setup.device(args.device)
    if distributed.world_size() > 1:
        raise UserError("a pipeline is quantized by one process; start it without torchrun")
    writable_folder(args.output.parent)
    beside = {kind: args.output.with_name(f"{args.output.name}.{kind}") for kind in ("report.json", "images.png")}
    with distributed.reserved(args.output, *beside.values()):
        sampler = Sampler(load(folder, component, variant, device), options)
        model = getattr(sampler.pipeline, component)
        plan_for(model, args.preset, adaln=args.adaln, skip=args.skip)  # before calibration, errors in patterns
        record = settings(args, sampler, component)
        sums = [fingerprint(file) for file in folder.weights(component, variant)]
        job = Job(args, sampler, component, lines, json.dumps([record, sums]))
        report, kept = job.quantize()
        with job.saved(folder, variant):
            fallbacks = job.accelerate()
            psnr = job.compare()
            drawn = job.draw(beside["images.png"], psnr)
            source = {"file": folder.path.resolve().name, "sha256": hashlib.sha256("".join(sums).encode()).hexdigest()}
            content = {
                **outputs.circumstances(args.command_line, device),
                **{"model": f"{sampler.kind}, {component}", "source": source, "settings": record},
                **{"kept": list(kept), "reasons": kept, "fallbacks": fallbacks or None, "psnr": psnr},
                **report.to_dict(),
            }
            write_json(beside["report.json"], content)
        job.remove()
    warnings = [*report.warnings, *filter(None, [fallbacks])]
    for warning in warnings:
        warn(warning)
    written = [args.output, *(place for kind, place in beside.items() if drawn or kind == "report.json")]
    data = {"output": args.output, "report": beside["report.json"], "images": beside["images.png"] if drawn else None}
    data |= {"psnr": psnr, "reasons": kept, **report.to_dict(), "warnings": warnings}
    return Result(data, [*summary(report, kept, psnr), *written], written)


def settings(args: argparse.Namespace, sampler: "Sampler", component: str) -> dict[str, Any]:
    """What decides the result, as JSON."""
    from svdit.extras import require

    calibration = {
        "images": args.calib_images,
        "calls": args.calib_calls,
        "seed": args.seed,
        "options": sampler.options,
    }
    calibration["prompts"] = Path(args.prompts).name if args.prompts else None
    return {
        **{"mode": "pipeline", "pipeline": sampler.kind, "component": component, "preset": args.preset},
        **{"adaln": args.adaln, "skip": args.skip, "recipe": asdict(RECIPES[args.preset]), "calibration": calibration},
        **{"compared": args.images, "diffusers": require("diffusers").__version__},
    }


def call_options(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE as options of a call: JSON values, or text. Raises UserError for others."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not (name.isidentifier() and equals and text):
            raise UserError(f"--call has {pair!r}; write NAME=VALUE, for example height=512")
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    return options


def prompt_lines(path: str | None) -> list[str]:
    """The lines of a text file that are not empty; none without a file. Raises UserError where it cannot be used."""
    from svdit.files import reading

    if path is None:
        return []
    try:
        with reading(path):
            lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except ValueError:
        raise UserError(
            f"--prompts is {path}, which is no text in UTF-8; pass a file with one prompt per line"
        ) from None
    if not any(lines):
        raise UserError(f"--prompts is {path}, which is empty; write one prompt per line")
    return [line for line in lines if line]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a report."""
    from svdit.files import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False, default=str), encoding="utf-8")


def summary(report: "QuantReport", kept: dict[str, str], psnr: list[float]) -> "Iterator[Table | str]":
    """The table of layers, what is left alone, and the totals."""
    from svdit.cli.quantize import summary

    yield from summary(report)
    for reason in dict.fromkeys(kept.values()):
        names = [name for name, each in kept.items() if each == reason]
        yield f"left alone, {reason}: {', '.join(names[:3])}" + (f", … ({len(names)} layers)" if len(names) > 3 else "")
    if psnr:
        each = ", ".join(f"{value:.1f}" for value in psnr)
        yield f"PSNR of images to those of full precision from the same seeds: {each} dB"
