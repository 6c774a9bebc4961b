"""Quality of the digits model: recognition, novelty and diversity of its samples.

A support vector classifier is trained on the model's training digits; held-out real digits are its test set and the
baseline of every metric. Distances are Euclidean, in the data's 17 grey levels, to the nearest training digit.

    python benchmarks/digits_quality.py --ckpt digits --cfg-scale 1.5 --sampler ddim --steps ddim50 --grid grid.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from record import record
from sklearn.metrics import pairwise_distances
from sklearn.svm import SVC

from svdit.checkpoints.store import load_model
from svdit.diffusion.noise import image_noise
from svdit.images import grid, to_float, write_png
from svdit.model.autoencoder import load_autoencoder
from svdit.model.dit import DiT
from svdit.sampling.batch import SamplingConfig, pictures
from svdit.training.data import Pictures, digits

COUNT = 1000
BATCH = 250


def flat(pixels: torch.Tensor) -> np.ndarray:
    """(N, 1, 8, 8) in [-1, 1] to (N, 64) in the data's levels, 0 … 16."""
    return ((pixels.flatten(1) + 1) * 8).numpy()


def real(dataset: Pictures) -> np.ndarray:
    """All images of a data set, (N, 64)."""
    return flat(torch.stack([dataset.read(i) for i in range(len(dataset))]))


def generated(model: DiT, labels: torch.Tensor, config: SamplingConfig, seed: int) -> np.ndarray:
    """Generated images of the given labels (N,), uint8 (N, 8, 8, 3)."""
    shape = (model.config.in_channels, model.config.input_size, model.config.input_size)
    autoencoder = load_autoencoder("none", torch.device("cpu"))
    batches = [
        pictures(model, autoencoder, labels[i : i + BATCH], image_noise(seed, range(i, i + BATCH), shape, CPU), config)
        for i in range(0, len(labels), BATCH)
    ]
    return np.concatenate(batches)


def class_variance(x: np.ndarray, labels: np.ndarray) -> float:
    """Within-class variance of x (N, 64), averaged over pixels and classes."""
    return float(np.mean([x[labels == k].var(axis=0).mean() for k in np.unique(labels)]))


def metrics(images: np.ndarray, labels: np.ndarray) -> dict[str, tuple[float, str]]:
    """All metrics with their units; images (N, 64), labels (N,)."""
    trained, held_out = digits()
    known, test = real(trained), real(held_out)
    classifier = SVC(gamma=0.001).fit(known, trained.labels)
    to_real = pairwise_distances(test, known).min(axis=1)
    to_generated = pairwise_distances(images, known).min(axis=1)
    return {
        "classifier_right_on_held_out_real": (100 * classifier.score(test, held_out.labels), "%"),
        "recognised_as_class_asked_for": (100 * classifier.score(images, labels), "%"),
        "closer_than_1st_percentile_of_held_out": (100 * np.mean(to_generated < np.percentile(to_real, 1)), "%"),
        "closer_than_closest_held_out": (100 * np.mean(to_generated < to_real.min()), "%"),
        "median_nearest_distance_over_held_out": (np.median(to_generated) / np.median(to_real), "ratio"),
        "class_variance_over_held_out": (
            class_variance(images, labels) / class_variance(test, held_out.labels),
            "ratio",
        ),
    }


CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="digits")
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--steps", default="ddim50")
    parser.add_argument("--cfg-scale", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=Path, help="write a grid of the first 100 images")
    args = parser.parse_args()
    config = SamplingConfig(args.sampler, args.steps, args.cfg_scale)
    labels = torch.arange(COUNT) % 10
    images = generated(load_model(args.ckpt), labels, config, args.seed)
    if args.grid:
        write_png(args.grid, grid(images[:100], 10, scale=6))
    note = f"{args.ckpt}, {args.sampler} {args.steps}, cfg {args.cfg_scale:g}, seed {args.seed}, {COUNT} images"
    for name, (value, unit) in metrics(flat(to_float(images)[:, :1]), labels.numpy()).items():
        record("digits_quality", name, value, unit, note)


if __name__ == "__main__":
    main()
