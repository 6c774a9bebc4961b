"""How the time of a block of DiT-XL/2 grows with tokens, batch, rank and threads, in floats and quantized.

    python benchmarks/bench_growth.py             # measures, and draws
    python benchmarks/bench_growth.py --plot      # draws the recorded rows again: docs/images/growth.png

A block is a model of two less a model of one, so that the embedders and the final layer do not count. Everything else
as in bench_cpu.py: one process, candidates in shuffled order, medians of the rounds.
"""

import argparse
import re
import statistics
from pathlib import Path

import torch
from bench_cpu import Run, measure
from random_models import in_floats, model_inputs, quantized
from record import record
from tables import latest

from svdit.kernels.cpu import ffi
from svdit.runtime.accelerate import accelerate

METHODS = ("fp32", "W8A8", "W4A8")
AXES: dict[str, tuple[int, ...]] = {
    "tokens": (256, 1024, 4096),
    "batch": (2, 4, 8, 16, 32, 64),
    "rank": (0, 8, 16, 32, 64, 128),
    "threads": (1, 2),
}
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "growth.png"


def block_times(tokens: int = 256, batch: int = 2, rank: int = 32, rounds: int = 5) -> dict[str, float]:
    """Milliseconds a block, for each method."""
    size = 2 * round(tokens**0.5)
    inputs, runs = model_inputs(batch, size), dict[str, Run]()
    for depth in (1, 2):
        for method in METHODS:
            model = quantized("W4A8" if method == "W4A8" else "W8A8", "int8", depth, rank, size)
            model = in_floats(model) if method == "fp32" else accelerate(model)
            runs[f"{method} {depth}"] = lambda model=model: model(*inputs)
    times = measure(runs, rounds)
    pairs = {method: zip(times[f"{method} 2"], times[f"{method} 1"], strict=True) for method in METHODS}
    return {method: 1e3 * statistics.median(two - one for two, one in pair) for method, pair in pairs.items()}


def run(axes: list[str], least: int, rounds: int) -> None:
    threads = torch.get_num_threads()
    for axis in axes:
        for value in (value for value in AXES[axis] if value >= least):
            if axis == "threads":
                torch.set_num_threads(min(value, threads))
            found = block_times(**{} if axis == "threads" else {axis: value}, rounds=rounds)
            for method, milliseconds in found.items():
                record("growth", f"{axis} {value} {method}", milliseconds, "ms", f"a block, {ffi.kernels().isa}")
    torch.set_num_threads(threads)


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = latest("growth")
    figure, places = plt.subplots(1, len(AXES), figsize=(13, 3.2), layout="constrained")
    for place, (axis, values) in zip(places, AXES.items(), strict=True):
        for method in METHODS:
            place.plot(values, [float(rows[f"{axis} {v} {method}"]["value"]) for v in values], "o-", ms=4, label=method)
        place.set(xlabel=axis)
        if axis in ("tokens", "batch"):
            place.set(xscale="log", yscale="log")
        else:
            place.set_ylim(0)
        if axis != "rank":
            place.set(xticks=values, xticklabels=values)
            place.minorticks_off()
        place.grid(alpha=0.3)
    places[0].set_ylabel("a block, ms")
    places[0].legend()
    row = rows[f"tokens 256 {METHODS[0]}"]
    rest = "256 tokens, batch 2, rank 32, but for what varies"
    figure.suptitle(f"DiT-XL/2, {re.sub(', [0-9]+ threads', '', row['machine'])}; {rest}", fontsize=10)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--least", type=int, default=0, help="leave out what is smaller on the axis")
    parser.add_argument("--plot", action="store_true", help="draw what is recorded")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if not args.plot:
        run(args.axes, args.least, args.rounds)
    if args.plot or set(args.axes) == set(AXES):
        plot()


if __name__ == "__main__":
    main()
