"""How good the digits model is: are its digits recognised, are they new, and are they as varied as real ones?

A support vector classifier learns from the real digits the model was trained on; held-out real digits are its test and
the yardstick for everything else. Distances are Euclidean, in the data's 17 grey levels, to the nearest trained digit.

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


def real(pictures: Pictures) -> np.ndarray:
    return flat(torch.stack([pictures.read(i) for i in range(len(pictures))]))


def generated(model: DiT, labels: torch.Tensor, config: SamplingConfig, seed: int) -> np.ndarray:
    """Pictures as a user gets them, uint8 (N, 8, 8, 3)."""
    shape = (model.config.in_channels, model.config.input_size, model.config.input_size)
    autoencoder = load_autoencoder("none", torch.device("cpu"))
    drawn = [
        pictures(model, autoencoder, labels[i : i + BATCH], image_noise(seed, range(i, i + BATCH), shape, CPU), config)
        for i in range(0, len(labels), BATCH)
    ]
    return np.concatenate(drawn)


def class_variance(x: np.ndarray, labels: np.ndarray) -> float:
    """The variance of a pixel within its class, averaged over pixels and classes."""
    return float(np.mean([x[labels == k].var(axis=0).mean() for k in np.unique(labels)]))


def figures(made: np.ndarray, asked: np.ndarray) -> dict[str, tuple[float, str]]:
    """Every figure with its unit."""
    trained, held_out = digits()
    known, test = real(trained), real(held_out)
    classifier = SVC(gamma=0.001).fit(known, trained.labels)
    to_real = pairwise_distances(test, known).min(axis=1)
    to_made = pairwise_distances(made, known).min(axis=1)
    return {
        "classifier_right_on_held_out_real": (100 * classifier.score(test, held_out.labels), "%"),
        "recognised_as_class_asked_for": (100 * classifier.score(made, asked), "%"),
        "closer_than_1st_percentile_of_held_out": (100 * np.mean(to_made < np.percentile(to_real, 1)), "%"),
        "closer_than_closest_held_out": (100 * np.mean(to_made < to_real.min()), "%"),
        "median_nearest_distance_over_held_out": (np.median(to_made) / np.median(to_real), "ratio"),
        "class_variance_over_held_out": (
            class_variance(made, asked) / class_variance(test, held_out.labels),
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
    parser.add_argument("--grid", type=Path, help="write a picture of the first hundred")
    args = parser.parse_args()
    config = SamplingConfig(args.sampler, args.steps, args.cfg_scale)
    asked = torch.arange(COUNT) % 10
    made = generated(load_model(args.ckpt), asked, config, args.seed)
    if args.grid:
        write_png(args.grid, grid(made[:100], 10, scale=6))
    note = f"{args.ckpt}, {args.sampler} {args.steps}, cfg {args.cfg_scale:g}, seed {args.seed}, {COUNT} pictures"
    for name, (value, unit) in figures(flat(to_float(made)[:, :1]), asked.numpy()).items():
        record("digits_quality", name, value, unit, note)


if __name__ == "__main__":
    main()
