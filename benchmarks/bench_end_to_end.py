"""End-to-end image quality: 256 digits from the same noise, quantized compared with full precision.

    python benchmarks/bench_end_to_end.py presets      # every preset, and the published algorithm with GPTQ
    python benchmarks/bench_end_to_end.py ablation     # the recipe without one ingredient at a time, W4A4 and W4A8
    python benchmarks/bench_end_to_end.py ranks        # rank 0, 8, 16, 32, 64
    python benchmarks/bench_end_to_end.py budget       # uniform settings, and --target-size at the same sizes
    python benchmarks/bench_end_to_end.py backends     # each of this processor's instruction sets

DDIM with 50 steps, guidance 1.5, rank 8 by default; PSNR, the mean over images and pooled over their squared errors,
and relative L2 of uint8 images. Calibrating on other noise changes the PSNR by some 0.1 dB, so every number is a mean
over several calibrations, with its standard error.
"""

import argparse
import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
from record import record

from svdit.checkpoints.store import load_model
from svdit.diffusion.noise import image_labels, image_noise
from svdit.images import Pixels
from svdit.kernels.cpu import choice, ffi
from svdit.kernels.formats import ACT_FORMATS, WEIGHT_FORMATS, Format
from svdit.model.dit import DiT
from svdit.quant.budget import HEADER, plan_
from svdit.quant.config import RECIPES, QuantConfig, Recipe, dit_config
from svdit.quant.observe import ForwardLoop
from svdit.quant.quantize import quantize_
from svdit.runtime.accelerate import accelerate
from svdit.sampling.batch import SamplingConfig, generate_images
from svdit.sampling.calibration import calibration_loop, calibration_size

WALK = SamplingConfig("ddim", "50", 1.5)
RANK, BATCH, CPU = 8, 16, torch.device("cpu")  # activations of a batch of 16 fit in the cache
PUBLISHED = replace(RECIPES["svdquant-w4a4"], rounding="gptq")
BEST_PUBLISHED = {
    "svdquant-w4a4, gptq": PUBLISHED,
    "svdquant w4a8, gptq": replace(PUBLISHED, act=ACT_FORMATS["int8"]),
    "svdquant w8a8, gptq": replace(RECIPES["svdquant"], rounding="gptq"),
}

Choice = Callable[[DiT, int], QuantConfig]  # arguments: model, calibration seed


def uniform(recipe: Recipe) -> Choice:
    """The same recipe for every linear of the blocks."""
    return lambda model, seed: dit_config(recipe)


def presets() -> dict[str, Choice]:
    """All presets and the published variants with GPTQ."""
    return {name: uniform(replace(recipe, rank=RANK)) for name, recipe in {**RECIPES, **BEST_PUBLISHED}.items()}


def ablation() -> dict[str, Choice]:
    """W4A4 and W4A8 with one ingredient removed, and some other storage formats."""
    without = {
        "branch": {"low_rank": "none"},
        "refit": {"low_rank": "svd"},
        "centring": {"centre": False},
        "smoothing": {"smoothing": 0},
        "hadamard": {"hadamard": 0},
        "searched scales": {"search_scales": False},
        "gptq": {"rounding": "nearest"},
    }
    choices = {}
    for base in ("w4a4", "w4a8"):
        whole = replace(RECIPES[base], rank=RANK)
        choices[base] = uniform(whole)
        choices |= {f"{base}, no {what}": uniform(replace(whole, **change)) for what, change in without.items()}
        choices[f"{base}, int8 factors"] = uniform(replace(whole, factors=Format(8)))
    choices["w8a8, int8 factors"] = uniform(replace(RECIPES["w8a8"], rank=RANK, factors=Format(8)))
    choices["w4a8, bfloat16 scales"] = uniform(replace(RECIPES["w4a8"], rank=RANK, weight=WEIGHT_FORMATS["int4-bf16"]))
    choices["w4a8, adaLN INT4"] = lambda model, seed: dit_config(replace(RECIPES["w4a8"], rank=RANK), "int4")
    return choices


def ranks() -> dict[str, Choice]:
    """Three presets at several ranks."""
    low = {"low_rank": "none"}
    return {
        f"{base}, rank {r}": uniform(replace(RECIPES[base], rank=r, **({} if r else low)))
        for base in ("w4a4", "w4a8", "w8a8")
        for r in (0, 8, 16, 32, 64)
    }


def budget() -> dict[str, Choice]:
    """Uniform bit widths, and the planned choice at the size of each."""
    base, choices = replace(RECIPES["w4a8"], rank=RANK), dict[str, Choice]()
    for bits in (3, 4, 5, 6, 8):
        form = Format(8) if bits == 8 else Format(bits, 64, "int8" if bits < 5 else "bf16", "full")
        choices[f"{bits} bits"] = uniform(replace(base, weight=form))
        choices[f"planned, as large as {bits} bits"] = planned(base, replace(base, weight=form))
    return choices


def planned(base: Recipe, same_size: Recipe) -> Choice:
    """Bits and ranks chosen for the file size of a uniform recipe."""

    def choose(model: DiT, seed: int) -> QuantConfig:
        other = load_model("digits")
        report = quantize_(other, dit_config(replace(same_size, rounding="nearest")), calibration(other, seed))
        size = report.bytes_after + HEADER * len(report.layers)
        return plan_(model, dit_config(base), calibration(model, seed), target_bytes=size).config

    return choose


def backends(names: Sequence[str], full: Pixels, calibrations: int) -> None:
    """Record the same quantized models, by presets, on the reference and on the kernels of each instruction set.

    The portable one is skipped: it is slow, and computes the same as avx512bf16.
    """
    for name in names:
        errors: dict[str, list[tuple[float, float, float]]] = {}
        for seed in range(calibrations):
            model = load_model("digits")
            quantize_(model, presets()[name](model, seed), calibration(model, seed))
            for isa in ("reference", *ffi.isas()[:-1]):
                with patch.dict(os.environ, {"SVDIT_ISA": "" if isa == "reference" else isa}):
                    choice.choice.cache_clear()
                    fast = accelerate(copy.deepcopy(model), isa if isa == "reference" else "cpu")
                    errors.setdefault(isa, []).append(differences(draw(fast, len(full)), full))
            choice.choice.cache_clear()
        for isa, pairs in errors.items():
            psnr, pooled, relative = np.mean(pairs, axis=0)
            note = f"pooled {pooled:.2f}; {len(full)} digits, DDIM 50, cfg 1.5, rank 8; relative L2 {relative:.4f}; "
            note += f"{calibrations} calibrations"
            record("digits backends", f"`{name}`, {isa}", psnr, "dB", note)


WHAT = {"presets": presets, "ablation": ablation, "ranks": ranks, "budget": budget}


def calibration(model: DiT, seed: int = 0) -> ForwardLoop:
    """A calibration loop of the default size."""
    images, steps = calibration_size(model)
    return calibration_loop(images=images, steps=steps, seed=seed)


def draw(model: DiT, count: int, walk: SamplingConfig = WALK) -> Pixels:
    images = []
    for start in range(0, count, BATCH):
        indices = range(start, min(start + BATCH, count))
        labels, noise = (
            image_labels(1, indices, model.config.num_classes),
            image_noise(1, indices, model.input_shape, CPU),
        )
        images.append(generate_images(model, labels, walk, noise=noise))
    return np.concatenate(images)


def differences(a: Pixels, b: Pixels) -> tuple[float, float, float]:
    """PSNR in dB, mean over images and pooled, and relative L2 of a and b, uint8 (N, H, W, C)."""
    one, two = a.astype(np.float64), b.astype(np.float64)
    errors = squares(a, b)
    pooled = float(decibels(errors.mean()))
    return float(decibels(errors).mean()), pooled, float(np.linalg.norm(one - two) / np.linalg.norm(two))


def squares(a: Pixels, b: Pixels) -> np.ndarray:
    """The mean squared error (N,) of each image, for uint8 (N, H, W, C)."""
    return np.square(a.astype(np.float64) - b).mean(axis=(1, 2, 3))


def decibels(squares: np.ndarray) -> np.ndarray:
    """PSNR (…,) of mean squared errors (…,); identical images count as 100 dB."""
    return np.minimum(100, 10 * np.log10(255**2 / np.maximum(squares, 1e-9)))


def measured(choose: Choice, full: Pixels, seed: int) -> tuple[float, float, float, float, float]:
    """PSNR, pooled too, relative L2, median SQNR of the blocks' layers, and size in MB, for one calibration."""
    model = load_model("digits")
    report = quantize_(model, choose(model, seed), calibration(model, seed))
    layers = [line.sqnr for line in report.layers if line.sqnr is not None and "adaLN" not in line.name]
    psnr, pooled, relative = differences(draw(accelerate(model), len(full)), full)
    return psnr, pooled, relative, float(np.median(layers)) if layers else float("nan"), report.bytes_after / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=[*WHAT, "backends"])
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--calibrations", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="run only these names")
    args = parser.parse_args()
    full = draw(load_model("digits"), args.count)
    if args.what == "backends":
        backends(args.only or ("w8a8", "w4a8", "w4a4"), full, args.calibrations)
        return
    choices = WHAT[args.what]()
    for name in args.only or choices:
        runs = np.array([measured(choices[name], full, seed) for seed in range(args.calibrations)])
        psnr, pooled, relative, layer, megabytes = runs.mean(0)
        error = runs[:, 0].std(ddof=1) / args.calibrations**0.5 if args.calibrations > 1 else float("nan")
        note = f"{args.count} digits, DDIM 50, cfg 1.5, {megabytes:.3f} MB, "
        note += f"{args.calibrations} calibrations, se {error:.2f} dB, pooled {pooled:.2f}"
        record(f"digits {args.what}", f"{name} PSNR", psnr, "dB", note)
        record(f"digits {args.what}", f"{name} relative L2", relative, "", note)
        if np.isfinite(layer):
            record(f"digits {args.what}", f"{name} layer SQNR", layer, "dB", "median over layers")


if __name__ == "__main__":
    main()
