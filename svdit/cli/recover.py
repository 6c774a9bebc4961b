"""`svdit recover`: train the low-rank branch, biases and output scales of a quantized checkpoint against its source."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.cli import outputs, setup, verify
from svdit.cli.arguments import Parser, batch, integer, path
from svdit.cli.result import Result
from svdit.errors import UserError
from svdit.printing import note

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from svdit.model.dit import DiT
    from svdit.recovery.state import State

STEPS, BATCH = 1000, 32


def parser() -> Parser:
    """The options of `svdit recover`."""
    parser = Parser(
        "svdit recover",
        description="Train the low-rank branch, biases and output scales of a quantized checkpoint, so that its images "
        "approach those of full precision from the same noise. No data is needed; format, size and speed do not "
        "change. Rerun the same command to resume.",
    )
    add = parser.add_argument
    add("file", type=path, metavar="FILE", help="checkpoint of `svdit quantize`")
    add("--against", type=path, required=True, metavar="SOURCE", help="the checkpoint it was made from")
    outputs.add_output(parser, "recovered_model.safetensors", ".safetensors or .pt; ")
    add("--steps", type=integer(1, 100_000), default=STEPS, metavar="N", help="training steps; default: %(default)s")
    add("--batch-size", type=batch, default=BATCH, metavar="N", help="images at once; default: %(default)s")
    setup.add_seed(parser)
    setup.add_device(parser)
    return parser


def run(args: argparse.Namespace) -> Result:
    """Train, measure, write the copy and its report. Raises UserError for a file and a source that do not fit."""
    from svdit import __version__
    from svdit.checkpoints.io import fingerprint
    from svdit.checkpoints.store import load_model, locate, read_header
    from svdit.files import exclusive
    from svdit.pictures import setting, subject
    from svdit.progress import progress
    from svdit.recovery.loop import IMAGES, RecoverOptions, recover
    from svdit.recovery.states import Walk
    from svdit.runtime.accelerate import accelerate
    from svdit.sampling.numbers import RECOVERY_REPORTED

    outputs.output_file(args, ".safetensors", ".pt", beside=(".recovery.json", ".recovery.png"))
    device, file, source = setup.device(args.device), locate(args.file), locate(args.against)
    outputs.check_distinct("--output", args.output, file, source)
    with exclusive(args.output):
        provenance = verify.provenance_of(file, source)
        student = load_model(file, device=device)
        teacher = load_model(source, device=device, **verify.unrecorded(student))
        if student.cache_plan:
            note("the cache plan is omitted: it is for the file before recovery; run `svdit cache` on the output")
        scale = provenance["quantization"].get("calibration", {}).get("cfg_scale")
        options, walk = RecoverOptions(args.steps), Walk(scale, args.seed, args.batch_size)
        binding = {"svdit": __version__, "file": fingerprint(file), **asdict(walk), **asdict(options)}
        unfinished = args.output.with_name(f"{args.output.name}.partial")
        with progress("recovering", unit="steps") as tick:
            state, layers = recover(student, teacher, walk, options, unfinished / "recovery.pt", binding, tick)
        tensors = {name: layer.stored() for name, layer in layers.items()}
        fidelity = walk.fidelity(teacher, RECOVERY_REPORTED, IMAGES)
        before, after = (fidelity(accelerate(changed(file, device, each))) for each in ({}, tensors))
        record = {"file": file.name, "sha256": binding["file"], "seed": args.seed, "steps": state.best_point.step}
        record |= {"images": IMAGES, "before": before._asdict(), "after": after._asdict()}
        save(changed(file, device, tensors), teacher, args.output, file, provenance, record)
        about = subject((read_header(file) or {}).get("name") or file.name, setting(provenance["quantization"]))
        written = write_report(args.output, {**record, "settings": binding, "seconds": state.seconds}, state, about)
        remove(unfinished)
    if state.best_point.step == 0:
        note("no training step improved the held-out images: the output has the parameters of the input")
    gain = (
        f"PSNR to full precision, {IMAGES} held-out images: {before.psnr:.2f} dB before, {after.psnr:.2f} dB after "
        f"(pooled: {before.pooled:.2f} dB, {after.pooled:.2f} dB); {state.step} steps in {state.seconds:.0f} s"
    )
    paths = {"output": args.output, **written}
    shown = [path for path in paths.values() if path]
    return Result({**paths, **record, "seconds": state.seconds}, [gain, *shown], shown)


def changed(file: Path, device: "torch.device", tensors: "Mapping[str, Mapping[str, Tensor]]") -> "DiT":
    """The model of the file with other tensors (…) in some layers."""
    from svdit.checkpoints.store import load_model
    from svdit.recovery.layers import store_

    model = load_model(file, device=device)
    model.cache_plan = None
    store_(model, tensors)
    return model


def save(
    model: "DiT", teacher: "DiT", output: Path, file: Path, provenance: dict[str, Any], record: dict[str, Any]
) -> None:
    """Write the recovered model, with the errors that `svdit verify` compares."""
    from svdit.checkpoints.store import read_header, save_model

    errors = verify.layer_errors(model, teacher)
    quantization = provenance["quantization"] | {"weight_errors": {name: e.weight for name, e in errors.items()}}
    record = record | {"bias_errors": {name: e.bias for name, e in errors.items()}}
    provenance = {**provenance, "quantization": quantization, "recovery": record}
    save_model(model, output, name=(read_header(file) or {}).get("name", ""), provenance=provenance)


def write_report(output: Path, data: dict[str, Any], state: "State", about: str) -> dict[str, Path | None]:
    """Write the learning curve as JSON, and as PNG if matplotlib is installed; returns the paths."""
    from svdit.files import atomic_path
    from svdit.recovery.curve import draw

    report, figure = output.with_suffix(".recovery.json"), output.with_suffix(".recovery.png")
    with atomic_path(report) as temporary:
        content = {**data, "curve": [asdict(point) for point in state.curve]}
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    try:
        draw(figure, state.curve, state.best_point.step, about)
    except UserError as error:
        note(f"no figure: {error}")
        return {"report": report, "figure": None}
    return {"report": report, "figure": figure}


def remove(folder: Path) -> None:
    """Delete the state of a run that is complete."""
    from svdit.files import remove_empty

    (folder / "recovery.pt").unlink(missing_ok=True)
    remove_empty(folder)
