"""Quality of a digits model: are its digits recognized, new, and as varied as real ones?

A support vector classifier is trained on the real training digits; the real held-out digits are its test set and the
baseline of every figure. Distances are Euclidean, in the data's 17 grey levels, to the nearest training digit.

    python benchmarks/digits_quality.py --ckpt digits --cfg-scale 1.5 --grid grid.png

All models get 50 evaluations per image by default: 50 steps of DDIM, or 25 of Heun.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from record import record
from sklearn.metrics import pairwise_distances
from sklearn.svm import SVC

from svdit.checkpoints.store import load_model, locate, read_header
from svdit.diffusion.noise import image_noise
from svdit.images import to_float, write_png
from svdit.model.dit import DiT
from svdit.pictures import FULL_PRECISION, subject
from svdit.sampling.batch import SamplingConfig, default_sampling, generate_images
from svdit.sheet import sheet
from svdit.training.data import LabelledImages, digits

COUNT = 1000
BATCH = 250
CPU = torch.device("cpu")
STEPS = {"dit": ("ddim", "ddim50"), "sit": ("heun", "26"), "jit": ("heun", "25")}  # SiT counts times


def levels(pixels: torch.Tensor) -> np.ndarray:
    """(N, 1, 8, 8) in [-1, 1] to (N, 64) in the data's levels, 0 … 16."""
    return ((pixels.flatten(1) + 1) * 8).numpy()


def real(images: LabelledImages) -> np.ndarray:
    """All images as (N, 64) levels."""
    return levels(torch.stack([images.read(i) for i in range(len(images))]))


def generated(model: DiT, labels: list[int], config: SamplingConfig, seed: int) -> np.ndarray:
    """Generated images, uint8 (N, 8, 8, 3)."""
    batches = [range(i, min(i + BATCH, len(labels))) for i in range(0, len(labels), BATCH)]
    parts = []
    for batch in batches:
        noise = image_noise(seed, batch, model.input_shape, CPU)
        parts.append(generate_images(model, [labels[i] for i in batch], config, noise=noise))
    return np.concatenate(parts)


def class_variance(x: np.ndarray, labels: np.ndarray) -> float:
    """Variance of a pixel within its class, averaged over pixels and classes."""
    return float(np.mean([x[labels == k].var(axis=0).mean() for k in np.unique(labels)]))


def figures(samples: np.ndarray, labels: np.ndarray) -> dict[str, tuple[float, str]]:
    """Every figure of samples (N, 64) with labels (N,), with its unit."""
    training_set, held_out = digits()
    training, test = real(training_set), real(held_out)
    classifier = SVC(gamma=0.001).fit(training, training_set.labels)
    from_test = pairwise_distances(test, training).min(axis=1)
    from_samples = pairwise_distances(samples, training).min(axis=1)
    return {
        "classifier_right_on_held_out_real": (100 * classifier.score(test, held_out.labels), "%"),
        "recognised_as_class_asked_for": (100 * classifier.score(samples, labels), "%"),
        "closer_than_1st_percentile_of_held_out": (100 * np.mean(from_samples < np.percentile(from_test, 1)), "%"),
        "closer_than_closest_held_out": (100 * np.mean(from_samples < from_test.min()), "%"),
        "median_nearest_distance_over_held_out": (np.median(from_samples) / np.median(from_test), "ratio"),
        "class_variance_over_held_out": (
            class_variance(samples, labels) / class_variance(test, held_out.labels),
            "ratio",
        ),
    }


def drawn(images: np.ndarray, config: SamplingConfig, ckpt: str) -> np.ndarray:
    """A sheet of the first hundred images, one column per class."""
    name = (read_header(locate(ckpt)) or {}).get("name") or ckpt
    about = subject(name, FULL_PRECISION, f"{config.sampler} {config.steps}", f"guidance {config.cfg_scale:g}")
    rows = [("", list(images[i : i + 10])) for i in range(0, 100, 10)]
    return sheet("Generated digits", about, rows, ("class", [str(k) for k in range(10)]))


def main() -> None:
    """Generate, measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="digits")
    parser.add_argument("--sampler")
    parser.add_argument("--steps")
    parser.add_argument("--cfg-scale", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=Path, help="write a sheet of the first hundred images")
    args = parser.parse_args()
    model, labels = load_model(args.ckpt), [i % 10 for i in range(COUNT)]
    sampler, steps = STEPS[model.config.family]
    config = default_sampling(
        model.config, sampler=args.sampler or sampler, steps=args.steps or steps, cfg_scale=args.cfg_scale
    )
    images = generated(model, labels, config, args.seed)
    if args.grid:
        write_png(args.grid, drawn(images, config, args.ckpt))
    note = f"{args.ckpt}, {config.sampler} {config.steps}, cfg {args.cfg_scale:g}, seed {args.seed}, {COUNT} images"
    for name, (value, unit) in figures(levels(to_float(images)[:, :1]), np.array(labels)).items():
        record("digits_quality", name, value, unit, note)


if __name__ == "__main__":
    main()
