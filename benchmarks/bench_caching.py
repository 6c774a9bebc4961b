"""Speed against quality of cache plans on the digits, beside schedules that skip every block in whole steps.

    python benchmarks/bench_caching.py [--models digits digits-sit digits-jit] [--plot FILE.png]

Speed-ups are counted in block evaluations, and time is measured beside them. PSNR is paired: to the images of the same
model without caching, and to those in full precision. The schedules run every n-th step and reuse its features, or
extrapolate them linearly in time from the last two evaluations (Taylor expansion of first order). Images are none of
those that plans are measured on. A full run takes half an hour on one core.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from record import record
from torch import Tensor

from svdit.checkpoints.store import load_model
from svdit.cli import command
from svdit.diffusion.noise import image_labels, image_noise
from svdit.evaluation.paired import psnr
from svdit.images import to_uint8
from svdit.model.caching import CachePlan, Evaluate, cached
from svdit.model.dit import DiT
from svdit.runtime.accelerate import accelerate
from svdit.sampling.batch import SamplingConfig, default_sampling, generate
from svdit.sampling.caching import Planner, groups_of

STEPS = {"dit": ("ddim", "50"), "sit": ("heun", "26"), "jit": ("heun", "25")}  # as benchmarks/digits_quality.py
SPEEDUPS, EVERY = (1.5, 2.0, 3.0, 4.0, 6.0), (2, 3, 4, 6)
SEED = 0
BELOW: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "color": "gray"}
STYLES = {"plan": "o-", "reuse": "s:", "taylor": "^--"}


class Point(NamedTuple):
    """What one way to skip blocks reaches; PSNRs in dB, to the same model without caching and to full precision."""

    method: str
    speedup: float
    own: float
    full: float
    seconds: float


def images(model: DiT, config: SamplingConfig, count: int, evaluate: Evaluate) -> tuple[np.ndarray, float]:
    """Images (N, H, W, 3) and the seconds they took."""
    noise = image_noise(SEED, range(count), model.input_shape, torch.device("cpu"))
    labels, start = image_labels(SEED, range(count), model.config.num_classes), time.perf_counter()
    x = generate(model, labels, config, noise=noise, evaluate=evaluate)
    return to_uint8(x, model.config.uint8), time.perf_counter() - start


def times_of(model: DiT, config: SamplingConfig) -> list[float]:
    """The time of every evaluation of the model."""
    times: list[float] = []

    def evaluate(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        times.append(float(t[0]))
        return x.new_zeros(len(x), model.used_channels, *x.shape[2:])

    generate(model, [0], config, evaluate=evaluate)
    return times


def every(n: int, method: str, times: list[float], stages: int, groups: tuple[int, ...]) -> CachePlan:
    """All evaluations of every n-th step run, with all blocks; the others reuse or extrapolate features."""
    runs, pairs, latest = "", list[tuple[float, float]](), list[int]()
    for i in range(len(times)):
        if i // stages % n == 0:
            runs, latest = runs + "1", [i, *latest[:1]]
            continue
        runs, slope = runs + "0", 0.0
        if method == "taylor" and len(latest) == 2:
            slope = (times[i] - times[latest[0]]) / (times[latest[0]] - times[latest[1]])
        pairs.append((1.0 + slope, -slope))
    record, count = {"speedup": len(runs) / runs.count("1")}, len(groups)
    return CachePlan(groups, (runs,) * count, (tuple(pairs),) * count, record=record)


def points(model: DiT, reference: np.ndarray, config: SamplingConfig, args: Any) -> Iterator[Point]:
    """Every plan and schedule of a model; `reference` has the images in full precision."""
    own, seconds = images(model, config, args.images, model)
    yield Point("none", 1.0, 100.0, mean_psnr(own, reference), seconds)
    times = times_of(model, config)
    stages = -(-len(times) // len(config.schedule(model.config)))
    groups = groups_of(model.config, 1)  # two, where the second begins with more tokens
    plans = [(method, every(n, method, times, stages, groups)) for n in EVERY for method in ("reuse", "taylor")]
    planner = Planner(model, config, images=args.measured)
    plans += [("plan", planner.plan(speedup)) for speedup in args.speedups]
    for method, plan in plans:
        skipped, seconds = images(model, config, args.images, cached(model, plan, model.config.depth))
        fidelity = mean_psnr(skipped, own), mean_psnr(skipped, reference)
        yield Point(method, plan.record["speedup"], *fidelity, seconds)


def mean_psnr(a: np.ndarray, b: np.ndarray) -> float:
    """The mean PSNR of images (N, H, W, 3) to their counterparts, in dB."""
    return float(np.mean([psnr(x, y) for x, y in zip(a, b, strict=True)]))


def quantized(name: str, folder: Path) -> DiT:
    """An embedded model as W8A8, ready for inference."""
    path = folder / f"{name}.safetensors"
    command("quantize", ["--ckpt", name, "--preset", "w8a8", "--no-figures", "--output", str(path), "--quiet"])
    return accelerate(load_model(path))


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    """Speed-up against PSNR, a column for each model and precision; above to itself, below to full precision."""
    matplotlib.use("agg")
    shape = {"nrows": 2, "ncols": len(curves), "figsize": (3.6 * len(curves), 6.4)}
    figure, axes = pyplot.subplots(**shape, sharex=True, squeeze=False)
    for column, (name, found) in enumerate(curves.items()):
        for row, key in enumerate(("own", "full")):
            for method, style in STYLES.items():
                line = sorted((p.speedup, getattr(p, key)) for p in found if p.method == method)
                axes[row][column].plot(*zip(*line, strict=True), style, label=method)
            axes[row][column].grid(alpha=0.3)
        axes[0][column].set_title(name)
        axes[1][column].set_xlabel("speed-up in block evaluations")
        if "W8A8" in name:
            axes[1][column].axhline(found[0].full, color="gray", linewidth=1)
            axes[1][column].annotate("no caching", (1, found[0].full), (-4, -12), **BELOW)
    axes[0][0].set_ylabel("PSNR to no caching, dB")
    axes[1][0].set_ylabel("PSNR to full precision, dB")
    axes[0][-1].legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["digits", "digits-sit", "digits-jit"])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--measured", type=int, default=8, help="images that plans are measured on")
    parser.add_argument("--speedups", type=float, nargs="+", default=SPEEDUPS)
    parser.add_argument("--plot", type=Path, default=Path(__file__).parents[1] / "docs" / "images" / "caching.png")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    curves: dict[str, list[Point]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            full = load_model(name)
            sampler, steps = STEPS[full.config.family]
            config = default_sampling(full.config, sampler=sampler, steps=steps, cfg_scale=1.5)
            reference, _ = images(full, config, args.images, full)
            for precision, model in (("fp32", full), ("W8A8", quantized(name, Path(folder)))):
                curve = curves[f"{name}, {precision}"] = []
                for point in points(model, reference, config, args):
                    curve.append(point)
                    note(f"{name} {precision}", point, curve[0].seconds, not args.no_record)
    draw(curves, args.plot)


def note(name: str, point: Point, seconds: float, recorded: bool) -> None:
    """Print and record one point."""
    what = f"{name}, {point.method} at {point.speedup:.2f}×"
    text = f"{point.full:.2f} dB to full precision; {seconds / point.seconds:.2f}× in time"
    if recorded:
        record("caching", what, point.own, "dB", text)
    else:
        print(f"{what:40} {point.own:7.2f} dB  {text}", flush=True)


if __name__ == "__main__":
    main()
