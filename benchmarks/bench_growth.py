"""Time of one DiT-XL/2 block by number of tokens, batch size, rank and threads, full precision and quantized.

    python benchmarks/bench_growth.py             # measure and plot
    python benchmarks/bench_growth.py --plot      # plot the recorded rows: docs/images/growth.png

The time of a block is that of a two-block model minus that of a one-block model, which excludes the embedders and the
final layer. The protocol is that of bench_cpu.py: one process, candidates in shuffled order, medians over rounds.
"""

import argparse
import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure
from random_models import in_floats, model_inputs, quantized
from record import record
from tables import extract, latest, read, short_name
from timing import Run, measure

from svdit import pictures
from svdit.kernels.cpu import choice
from svdit.model.config import DiTConfig
from svdit.pictures import COLOURS, blank, few_decades, subject
from svdit.runtime.accelerate import accelerate

METHODS = ("fp32", "W8A8", "W4A8")
AXES: dict[str, tuple[int, ...]] = {
    "tokens": (256, 1024, 4096),
    "batch": (2, 4, 8, 16, 32, 64),
    "rank": (0, 8, 16, 32, 64, 128),
    "threads": (1, 2),
}
XLABELS = {"tokens": "tokens of an image", "batch": "batch size", "rank": "rank of the branch", "threads": "threads"}
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "growth.png"


def block_times(tokens: int = 256, batch: int = 2, rank: int = 32, rounds: int = 5) -> dict[str, float]:
    """Milliseconds per block of each method."""
    size = 2 * round(tokens**0.5)
    inputs, runs = model_inputs(batch, DiTConfig(input_size=size)), dict[str, Run]()
    for depth in (1, 2):
        for method in METHODS:
            model = quantized("W4A8" if method == "W4A8" else "W8A8", "int8", depth, rank, size)
            model = in_floats(model) if method == "fp32" else accelerate(model)
            runs[f"{method} {depth}"] = lambda model=model: model(*inputs)
    times = measure(runs, rounds)
    pairs = {method: zip(times[f"{method} 2"], times[f"{method} 1"], strict=True) for method in METHODS}
    return {method: 1e3 * statistics.median(two - one for two, one in pair) for method, pair in pairs.items()}


def run(axes: list[str], minimum: int, rounds: int) -> None:
    """Measure and record each axis at its values from `minimum` on."""
    threads = torch.get_num_threads()
    for axis in axes:
        for value in (value for value in AXES[axis] if value >= minimum):
            if axis == "threads":
                torch.set_num_threads(min(value, threads))
            times = block_times(**{} if axis == "threads" else {axis: value}, rounds=rounds)
            for method, milliseconds in times.items():
                record("growth", f"{axis} {value} {method}", milliseconds, "ms", f"a block, {choice.choice()}")
    torch.set_num_threads(threads)


def plot() -> None:
    """Plot the recorded rows: one panel per axis, the same logarithmic scale of time in all."""
    rows = latest(read(), "growth")
    row = rows[f"tokens 256 {METHODS[0]}"]
    setting = "256 tokens, batch 2, rank 32, 2 threads unless varied"
    machine = subject(short_name(row), extract("(avx.*)", row["note"]), day=row["date"])
    about = f"DiT-XL/2, random weights; {setting}\n{machine}"
    pictures.plot(FIGURE, "Time of one transformer block", about, lambda: figure_of(rows))


def figure_of(rows: dict[str, dict[str, str]]) -> Figure:
    """The figure of `plot`."""
    figure, axes = blank(2, 2, 7, 5.2, sharey=True)
    for panel, (axis, values) in zip(axes.flat, AXES.items(), strict=True):
        for method, colour, style in zip(METHODS, COLOURS, ("o-", "s-", "^:"), strict=False):
            times = [float(rows[f"{axis} {value} {method}"]["value"]) for value in values]
            panel.plot(range(len(values)), times, style, color=colour, ms=5, mfc="none", label=method)
        panel.set(xlabel=XLABELS[axis], xticks=range(len(values)), xticklabels=values, yscale="log", ylim=(8, 4000))
        few_decades(panel.yaxis)
        panel.set_xlim(-0.3, len(values) - 0.7)
    for panel in axes[:, 0]:
        panel.set_ylabel("time of a block, ms")
    axes[0, 0].legend(loc="upper left")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--minimum", type=int, default=0, help="skip smaller values of each axis")
    parser.add_argument("--plot", action="store_true", help="only plot the recorded rows")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if not args.plot:
        run(args.axes, args.minimum, args.rounds)
    if args.plot or set(args.axes) == set(AXES):
        plot()


if __name__ == "__main__":
    main()
