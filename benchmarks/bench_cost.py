"""What quantizing a DiT-XL/2 costs: wall time by phase, peak memory, bytes on disk.

    python benchmarks/bench_cost.py [w4a8 w8a8 …] [--model DiT-XL/2]

Random weights, none of them zero: time and memory do not depend on the values.
"""

import argparse
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from record import record

from svdit.checkpoints.store import save_model
from svdit.model.zoo import DiT_models
from svdit.quant.config import RECIPES, dit_config
from svdit.quant.quantize import quantize_
from svdit.sampling.trajectories import calibration_loop, images_for


def random_model(name: str) -> torch.nn.Module:
    model = DiT_models[name]().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "adaLN" in key or key.startswith("final_layer"):
                parameter.normal_(std=0.02, generator=generator)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=["w4a8", "w8a8"])
    parser.add_argument("--model", default="DiT-XL/2")
    parser.add_argument("--adaln", default="int8")
    args = parser.parse_args()
    for preset in args.presets:
        model = random_model(args.model)
        start = time.perf_counter()
        loop = calibration_loop(images=images_for(model))
        report = quantize_(model, dit_config(replace(RECIPES[preset], rank=32), args.adaln), loop)
        seconds = {"total": time.perf_counter() - start, **report.seconds}
        for phase, value in seconds.items():
            record("cost", f"{args.model} {preset} {phase}", value / 60, "min")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        record("cost", f"{args.model} {preset} peak memory of the process", peak, "GB", "resident, so far")
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, Path(folder) / "model.safetensors")
            size = (Path(folder) / "model.safetensors").stat().st_size / 1e6
        record("cost", f"{args.model} {preset} adaLN {args.adaln} file", size, "MB", "rank 32")


if __name__ == "__main__":
    main()
