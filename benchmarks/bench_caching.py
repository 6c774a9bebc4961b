"""Speed against quality of cache plans on the digits, beside schedules that skip every block in whole steps.

    python benchmarks/bench_caching.py [--models digits digits-sit digits-jit]
    python benchmarks/bench_caching.py --plot       # only plot the recorded rows: docs/images/caching.png
    python benchmarks/bench_caching.py --large      # only time, of DiT-XL/2 with random weights

Speed-ups are counted in block evaluations; that of plans is also measured in time, in the same rounds as sampling
without caching. PSNR is paired: to the images of the same model without caching, and to those in full precision. The
schedules run every n-th step and reuse its features, or extrapolate them linearly in time from the last two evaluations
(Taylor expansion of first order). Images are none of those that plans are measured on. A full run takes ten minutes on
one core.
"""

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from random_models import quantized as random_quantized
from record import record
from tables import extract, latest, read, short_name
from timing import measure, ratio
from torch import Tensor

from svdit import pictures
from svdit.checkpoints.store import load_model
from svdit.cli import command
from svdit.diffusion.noise import image_labels, image_noise
from svdit.evaluation.paired import psnr
from svdit.images import to_uint8
from svdit.model.caching import CachePlan, cached
from svdit.model.dit import DiT
from svdit.pictures import COLOURS, blank, subject
from svdit.runtime.accelerate import accelerate
from svdit.sampling.batch import SamplingConfig, default_sampling, generate
from svdit.sampling.caching import Planner, groups_of

STEPS = {"dit": ("ddim", "50"), "sit": ("heun", "26"), "jit": ("heun", "25")}  # as benchmarks/digits_quality.py
NAMES = {"dit": "DiT", "sit": "SiT", "jit": "JiT"}
SPEEDUPS, EVERY = (2.0, 3.0, 4.0, 6.0), (2, 3, 4, 6)
SEED, BATCH = 0, 8  # BATCH images are timed
PRECISIONS = ("fp32", "W8A8")
STYLES = {"plan": "o-", "Taylor": "^--", "reuse": "s:"}
LABELS = {"plan": "plan of svdit cache", "Taylor": "every n-th step, Taylor", "reuse": "every n-th step, reuse"}
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "caching.png"


class Point(NamedTuple):
    """What one way to skip blocks reaches; PSNRs in dB, to the same model without caching and to full precision."""

    method: str
    nominal: float
    speedup: float
    own: float
    full: float


def sampled(model: DiT, config: SamplingConfig, count: int, plan: CachePlan | None = None) -> Tensor:
    """Images or latents (N, C, H, W)."""
    noise = image_noise(SEED, range(count), model.input_shape, torch.device("cpu"))
    labels = image_labels(SEED, range(count), model.config.num_classes)
    evaluate = cached(model, plan, model.config.depth) if plan else model
    return generate(model, labels, config, noise=noise, evaluate=evaluate)


def images(model: DiT, config: SamplingConfig, count: int, plan: CachePlan | None = None) -> np.ndarray:
    """Images (N, H, W, 3)."""
    return to_uint8(sampled(model, config, count, plan), model.config.uint8)


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
        if method == "Taylor" and len(latest) == 2:
            slope = (times[i] - times[latest[0]]) / (times[latest[0]] - times[latest[1]])
        pairs.append((1.0 + slope, -slope))
    record, count = {"speedup": len(runs) / runs.count("1")}, len(groups)
    return CachePlan(groups, (runs,) * count, (tuple(pairs),) * count, record=record)


def schedules(model: DiT, config: SamplingConfig) -> Iterator[tuple[str, float, CachePlan]]:
    """Every schedule with its method and n."""
    times = times_of(model, config)
    stages = -(-len(times) // len(config.schedule(model.config)))
    groups = groups_of(model.config, 1)  # two, where the second begins with more tokens
    yield from ((method, n, every(n, method, times, stages, groups)) for n in EVERY for method in ("reuse", "Taylor"))


def points(
    model: DiT, config: SamplingConfig, reference: np.ndarray, count: int, plans: dict[float, CachePlan]
) -> Iterator[Point]:
    """Every schedule and plan of a model; `reference` has the images in full precision."""
    own = images(model, config, count)
    yield Point("none", 1.0, 1.0, 100.0, mean_psnr(own, reference))
    planned = [("plan", nominal, plan) for nominal, plan in plans.items()]
    for method, nominal, plan in [*schedules(model, config), *planned]:
        skipped = images(model, config, count, plan)
        yield Point(method, nominal, plan.record["speedup"], mean_psnr(skipped, own), mean_psnr(skipped, reference))


def speedups(
    model: DiT, config: SamplingConfig, plans: dict[float, CachePlan], rounds: int, count: int = BATCH
) -> dict[float, float]:
    """How many times faster sampling is with each plan, in the same rounds."""
    runs = {str(nominal): partial(sampled, model, config, count, plan) for nominal, plan in plans.items()}
    times = measure({"none": partial(sampled, model, config, count), **runs}, rounds)
    return {nominal: ratio(times, "none", str(nominal)).value for nominal in plans}


def mean_psnr(a: np.ndarray, b: np.ndarray) -> float:
    """The mean PSNR of images (N, H, W, 3) to their counterparts, in dB."""
    return float(np.mean([psnr(x, y) for x, y in zip(a, b, strict=True)]))


def quantized(name: str, folder: Path) -> DiT:
    """An embedded model as W8A8, ready for inference."""
    path = folder / f"{name}.safetensors"
    command("quantize", ["--ckpt", name, "--preset", "w8a8", "--no-figures", "--output", str(path), "--quiet"])
    return accelerate(load_model(path))


def plot() -> None:
    """Plot the recorded rows, which are those of the table in docs/caching.md."""
    rows = latest(read(), "caching")
    row = list(rows.values())[-1]
    about = subject("digits models, 32 images, 50 evaluations, guidance 1.5", short_name(row), day=row["date"])
    title = "Feature caching: PSNR to the same model without caching"
    pictures.plot(FIGURE, title, about, lambda: figure_of(rows))


def figure_of(rows: dict[str, dict[str, str]]) -> Figure:
    """The figure of `plot`: a column for each model, fp32 above, W8A8 below."""
    figure, axes = blank(2, len(NAMES), 8.4, 5.6, sharex=True, sharey=True)
    for precision, line in zip(PRECISIONS, axes, strict=True):
        for model, panel in zip(NAMES.values(), line, strict=True):
            for (method, style), colour in zip(STYLES.items(), COLOURS, strict=False):
                found = [rows[f"{model}, {precision}, {method} {nominal:g}×"] for nominal in SPEEDUPS]
                points = [(float(extract("^([0-9.]+)×", row["note"])), float(row["value"])) for row in found]
                panel.plot(*zip(*points, strict=True), style, color=colour, ms=5, label=LABELS[method])
            panel.set(title=f"{model}, {precision}")
        line[0].set_ylabel("PSNR, dB")
    for panel in axes[-1]:
        panel.set(xlabel="speed-up in block evaluations", xticks=SPEEDUPS)
    axes[0, -1].legend(loc="upper right")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["digits", "digits-sit", "digits-jit"])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--measured", type=int, default=8, help="images that plans are measured on")
    parser.add_argument("--speedups", type=float, nargs="+", default=SPEEDUPS)
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    parser.add_argument("--large", action="store_true", help="only the time of DiT-XL/2 with random weights")
    parser.add_argument("--plot", action="store_true", help="only plot the recorded rows")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    if args.plot:
        plot()
        return
    if args.large:
        large(args)
        return
    torch.set_num_threads(1)
    curves: dict[tuple[str, str], list[Point]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            full = load_model(name)
            sampler, steps = STEPS[full.config.family]
            config = default_sampling(full.config, sampler=sampler, steps=steps, cfg_scale=1.5)
            reference = images(full, config, args.images)
            setting = f"{args.images} digits, {sampler} {steps}, cfg 1.5"
            for precision, model in zip(PRECISIONS, (full, quantized(name, Path(folder))), strict=True):
                kind = NAMES[full.config.family], precision
                planner = Planner(model, config, images=args.measured)
                plans = {speedup: planner.plan(speedup) for speedup in args.speedups}
                curves[kind] = list(points(model, config, reference, args.images, plans))
                note(", ".join(kind), curves[kind], setting, args)
                for nominal, faster in speedups(model, config, plans, args.rounds).items():
                    keep(f"{', '.join(kind)}, plan {nominal:g}×, time", faster, "×", f"{BATCH} images; {setting}", args)
    if not args.no_record and set(NAMES.values()) == {model for model, _ in curves}:
        plot()


def note(kind: str, curve: list[Point], setting: str, args: argparse.Namespace) -> None:
    """Record the points of one model."""
    for point in curve[1:]:
        text = f"{point.speedup:.2f}× in block evaluations; {point.full:.2f} dB to full precision; {setting}"
        keep(f"{kind}, {point.method} {point.nominal:g}×", point.own, "dB", text, args)


def large(args: argparse.Namespace) -> None:
    """Time of DiT-XL/2 at W8A8, where blocks run at every second or fourth of 12 steps."""
    model = accelerate(random_quantized("W8A8"))
    config = default_sampling(model.config, sampler="ddim", steps="12", cfg_scale=1.5)
    plans = {n: plan for method, n, plan in schedules(model, config) if method == "Taylor" and n in (2, 4)}
    for n, faster in speedups(model, config, plans, 3, 1).items():
        keep(f"DiT-XL/2, W8A8, every {n}", faster, "×", "1 image; random weights, ddim 12", args, "caching large")


def keep(name: str, value: float, unit: str, text: str, args: argparse.Namespace, of: str = "caching") -> None:
    """Record one number of a benchmark, or print it only."""
    if args.no_record:
        print(f"{name:40} {value:7.2f} {unit:4} {text}", flush=True)
    else:
        record(of, name, value, unit, text)


if __name__ == "__main__":
    main()
