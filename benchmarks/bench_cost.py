"""Cost of quantizing DiT-XL/2: wall time by phase, peak memory, file size.

    python benchmarks/bench_cost.py [w8a8 w4a8 347 …]
    python benchmarks/bench_cost.py svd             # time of 100 exact SVDs of every weight
    python benchmarks/bench_cost.py rank-ratio      # the documented mode: --rank-ratio 0.95 --num-bits 8

A run is a preset, or a target size in MB. adaLN is INT8 for w8a8 and sizes above 500 MB, else INT4. The weights are
random and nonzero: time and memory do not depend on their values. All runs share one calibration; a user's run consists
of the calibration and one of the others.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import record

from svdit.checkpoints.store import save_model
from svdit.model.dit import DiT
from svdit.model.zoo import DiT_models
from svdit.quant.budget import Planner, options_of
from svdit.quant.config import RECIPES, QuantConfig, dit_config, rank_ratio_config
from svdit.quant.linear import linears
from svdit.quant.observe import observe
from svdit.quant.quantize import quantize_
from svdit.quant.select import select
from svdit.quant.sensitivity import Call, recording
from svdit.sampling.calibration import calibration_loop, calibration_size


def random_model(name: str) -> DiT:
    """A DiT whose zero-initialized layers are random instead."""
    model = DiT_models[name]().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "adaLN" in key or key.startswith("final_layer"):
                parameter.normal_(std=0.02, generator=generator)
    return model


def config_of(run: str) -> QuantConfig:
    """The configuration of a preset, or the one to start from for a size in MB."""
    preset = run if not run.isdigit() else "w8a8" if int(run) > 500 else "w4a8"
    return dit_config(RECIPES[preset], "int8" if preset == "w8a8" else "int4")


def file_megabytes(model: DiT) -> float:
    """Size of the saved model."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model.safetensors")
        return (Path(folder) / "model.safetensors").stat().st_size / 1e6


def exact_svd_hours(model: DiT, iterations: int = 100) -> float:
    """Hours for the float64 SVDs of SVDQuant's iteration without early stopping."""
    seconds = 0.0
    for name, layer in linears(model.blocks[0]):
        if "adaLN" not in name:
            start = time.perf_counter()
            torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
            seconds += time.perf_counter() - start
    return seconds * iterations * len(model.blocks) / 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", default=["w8a8", "w4a8", "347"])
    parser.add_argument("--model", default="DiT-XL/2")
    parser.add_argument("--images", type=int, help="calibration images; fewer to time only the other phases")
    args = parser.parse_args()

    def note(run: str, what: str, value: float, unit: str) -> None:
        record("cost", f"{args.model} {run} {what}", value, unit)

    if args.runs == ["svd"]:
        note("published", "100 exact float64 SVDs a weight", exact_svd_hours(random_model(args.model)), "h")
    elif args.runs == ["rank-ratio"]:
        report = quantize_(random_model(args.model), rank_ratio_config(0.95, 8))
        note("rank ratio 0.95", "solving", report.seconds["quantize"] / 60, "min")
    else:
        quantized(args.runs, args.model, args.images, note)


def quantized(runs: list[str], name: str, images: int | None, note: Callable[[str, str, float, str], None]) -> None:
    """Calibrate once, then record the time, memory and file size of every run."""
    start = time.perf_counter()
    model, calls = random_model(name), list[Call]()
    images, steps = calibration_size(model, images, calibration_size(model)[1])
    loop = recording(calibration_loop(images=images, steps=steps), calls)
    statistics = observe(model, [name for name, _ in linears(model) if name.startswith(("blocks", "final"))], loop)
    note(f"{images} images", "calibration", (time.perf_counter() - start) / 60, "min")
    for run in runs:
        del model
        start, model = time.perf_counter(), random_model(name)
        config = config_of(run)
        if run.isdigit():
            selection = select(model, config)
            options = dict(options_of(selection, {name: statistics[name] for name in selection.recipes}))
            config = Planner(model, selection, options, calls).within(int(run) * 10**6).config
            note(run, "plan", (time.perf_counter() - start) / 60, "min")
        report = quantize_(model, config, statistics=dict(statistics))
        note(run, "solving", report.seconds["quantize"] / 60, "min")
        note(run, "peak memory so far", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "GiB")
        note(run, "file", file_megabytes(model), "MB")


if __name__ == "__main__":
    main()
