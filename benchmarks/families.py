"""Which family is easier to quantize? DiT, SiT and JiT of one size, trained on the digits, from the same noise.

    python benchmarks/families.py methods [--only w4a4 …]   # PSNR to full precision and Fréchet distance to real images
    python benchmarks/families.py times                     # where along the trajectory the error arises, at W4A4
    python benchmarks/families.py layers                    # the layers next to the pixels, quantized or not

50 steps (DDIM for DiT, Euler for the flows), guidance 1.5, a rank of 1/16 of the width. PSNR: the mean over pairs of
images, and pooled, of the mean squared error of all. The Fréchet distance is that of the 64 pixels to all 1797 real
digits, with jackknife errors; those of differences to full precision are paired by seed. Means over two calibrations;
the error is the larger of that over images and that over calibrations.

A DiT-cifar10 trained with `train.py --data cifar10.npz` joins in:

    python benchmarks/families.py methods --ckpt CIFAR=ema.safetensors --data cifar10.npz --count 192

The Fréchet distance is then that of the means of 8 × 8 pixels, 48 numbers an image, to all images of the data: fewer
numbers than images, or their covariance would have no inverse.
"""

import argparse
from dataclasses import replace

import numpy as np
import torch
from bench_end_to_end import BEST_PUBLISHED, CPU, RANK, calibration, decibels, differences, draw, squares
from record import record
from torch import Tensor

from svdit.checkpoints.store import load_model
from svdit.diffusion.noise import image_labels, image_noise
from svdit.evaluation.frechet import jackknifed_distance
from svdit.evaluation.jackknife import Estimate, assign_blocks
from svdit.evaluation.statistics import Gaussian, Moments
from svdit.images import Pixels, to_uint8
from svdit.model.dit import DiT
from svdit.quant.config import RECIPES, QuantConfig, Recipe, Rule, dit_config, whole_bytes
from svdit.quant.quantize import quantize_
from svdit.runtime.accelerate import accelerate
from svdit.sampling.batch import SamplingConfig, default_sampling, generate
from svdit.training.data import digits, load

MODELS = {"DiT": "digits", "SiT": "digits-sit", "JiT": "digits-jit"}
STEPS = 50
CALIBRATIONS = (0, 1)  # seeds
METHODS: dict[str, Recipe] = {
    "w8a8": RECIPES["w8a8"],
    "svdquant-w8a8": BEST_PUBLISHED["svdquant w8a8, gptq"],
    "w4a8": RECIPES["w4a8"],
    "svdquant-w4a8": BEST_PUBLISHED["svdquant w4a8, gptq"],
    "w4a4": RECIPES["w4a4"],
    "svdquant-w4a4": BEST_PUBLISHED["svdquant-w4a4, gptq"],
}
WINDOWS = {str(i + 1): (5 * i, 5 * i + 5) for i in range(10)} | {"1 to 9": (0, 45), "all": (0, 50)}  # of STEPS


def walk_of(model: DiT) -> SamplingConfig:
    """50 first-order steps with guidance 1.5."""
    sampler = "euler" if model.config.is_flow else "ddim"
    number = STEPS + (model.config.family == "sit")  # which counts the points of the grid
    return default_sampling(model.config, sampler=sampler, steps=str(number), cfg_scale=1.5, cfg_channels=None)


def quantized(checkpoint: str, config: QuantConfig, seed: int = 0) -> tuple[DiT, float]:
    """The checkpoint's model, quantized with a calibration and accelerated, and its size in MB."""
    model = load_model(checkpoint)
    report = quantize_(model, config, calibration(model, seed))
    return accelerate(model), report.bytes_after / 1e6


def with_rank(recipe: Recipe, model: DiT) -> QuantConfig:
    """The rules of a recipe, with 1/16 of the model's width as its rank: RANK for the digits."""
    last_block = model.config.depth - 1 if model.config.prediction == "x0" else None
    return dit_config(replace(recipe, rank=model.config.hidden_size // 16), last_block=last_block)


def rows(images: Pixels) -> np.ndarray:
    """uint8 images (N, H, W, 3) as (N, D): digits by pixel, in the data's levels 0 to 16; others by 8 × 8 pixels."""
    count, size = images.shape[:2]
    if size == 8:
        return images[..., 0].reshape(count, -1).astype(np.float64) * (16 / 255)
    return images.reshape(count, size // 8, 8, size // 8, 8, 3).mean(axis=(2, 4)).reshape(count, -1)


def real(data: str) -> Gaussian:
    """The summary of all images of a training set; all 1797 digits, with those held out, of "digits"."""
    parts = digits() if data == "digits" else (load(data, 32),)
    images = rows(
        np.concatenate([to_uint8(part.read(i)[None].expand(-1, 3, -1, -1)) for part in parts for i in range(len(part))])
    )
    return Moments(images.shape[1]).add(torch.from_numpy(images)).gaussian()


def distance(reference: Gaussian, images: Pixels) -> Estimate:
    """The Fréchet distance of images to the real ones."""
    x = rows(images)
    summary = Moments(x.shape[1]).add(torch.from_numpy(x)).gaussian()
    values = jackknifed_distance(reference, summary, x, assign_blocks(len(x)))
    return Estimate(values[0], tuple(values[1:]))


def methods(checkpoints: dict[str, str], count: int, only: list[str], data: str) -> None:
    """Every method on every family: means over CALIBRATIONS."""
    reference = real(data)
    for family, checkpoint in checkpoints.items():
        model = load_model(checkpoint)
        walk = walk_of(model)
        full = draw(model, count, walk)
        base = distance(reference, full)
        rank = with_rank(METHODS["w8a8"], model).rules[-1].recipe.rank
        what = f"{count} {'digits' if data == 'digits' else 'images'}"
        setting = f"{what}, {walk.sampler} 50, cfg 1.5, rank {rank}, {len(CALIBRATIONS)} calibrations"
        megabytes = sum(p.numel() for p in model.parameters()) * 4 / 1e6
        note = f"se {base.se:.3g}; {megabytes:.2f} MB; {setting}"
        record("families", f"{family} full Fréchet", base.value, "", note)
        for name in only:
            config, drawn = with_rank(METHODS[name], model), []
            for seed in CALIBRATIONS:
                fast, megabytes = quantized(checkpoint, config, seed)
                drawn.append(draw(fast, count, walk))
            values = [decibels(squares(images, full)) for images in drawn]
            error = max(values[0].std(ddof=1) / count**0.5, np.std([v.mean() for v in values], ddof=1))
            pooled = 10 * np.log10(255**2 / np.mean([squares(images, full) for images in drawn]))
            relative = np.mean([differences(images, full)[2] for images in drawn])
            note = f"se {error:.2f}; pooled {pooled:.2f}; relative L2 {relative:.4f}; {megabytes:.2f} MB; {setting}"
            record("families", f"{family} {name} PSNR", np.mean(values), "dB", note)
            there = [distance(reference, images) for images in drawn]
            changes = [each.minus(base) for each in there]
            change, error = np.mean([each.value for each in changes]), max(each.se for each in changes)
            note = f"se {there[0].se:.3g}; difference {change:.3g} se {error:.3g}; {setting}"
            record("families", f"{family} {name} Fréchet", np.mean([each.value for each in there]), "", note)


class Mixed:
    """A full-precision model, of whose calls `first` to `last` − 1 the quantized one computes."""

    def __init__(self, model: DiT, other: DiT) -> None:
        self.full, self.other, self.count = model.forward, other, 0
        model.forward = self  # type: ignore[assignment]

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.count += 1
        return (self.other if self.first < self.count <= self.last else self.full)(x, t, y)

    def between(self, first: int, last: int) -> None:
        """Start to count."""
        self.first, self.last, self.count = first, last, 0


def times(checkpoints: dict[str, str], count: int) -> None:
    """The relative L2 error of the images where the quantized model computes some tenths of the steps only."""
    for family, checkpoint in checkpoints.items():
        model = load_model(checkpoint)
        walk, labels = walk_of(model), image_labels(1, range(count), model.config.num_classes)
        mixed = Mixed(model, quantized(checkpoint, with_rank(RECIPES["w4a4"], model))[0])
        images = {}
        for name, (first, last) in {"none": (0, 0), **WINDOWS}.items():
            mixed.between(first, last)
            noise = image_noise(1, range(count), model.input_shape, CPU)
            images[name] = generate(model, labels, walk, noise=noise)
        for name in WINDOWS:
            error = float((images[name] - images["none"]).norm() / images["none"].norm())
            note = f"{count} digits, {walk.sampler} {STEPS}, cfg 1.5, rank {RANK}"
            record("families by time", f"{family} w4a4, tenths {name}", error, "", note)


def layers(checkpoints: dict[str, str], count: int) -> None:
    """PSNR with other rules for the layers next to the pixels, over CALIBRATIONS."""
    for family, checkpoint in checkpoints.items():
        model = load_model(checkpoint)
        walk = walk_of(model)
        full, last = draw(model, count, walk), f"blocks.{model.config.depth - 1}.*"
        for name in ("w4a4", "w4a8"):
            recipe = replace(METHODS[name], rank=RANK)
            rules = dit_config(recipe).rules
            variants = {
                "alike": rules,
                "final adaLN in floats": (Rule("final_layer.*", None), *rules),
                "final linear quantized": (Rule("final_layer.linear", recipe), *rules),
                "first block in floats": (Rule("blocks.0.*", None), *rules),
                "last block in floats": (Rule(last, None), *rules),
                "last block in bytes": (Rule(last, whole_bytes(recipe)), *rules),
            }
            for what, choice in variants.items():
                drawn = [
                    draw(quantized(checkpoint, QuantConfig(choice), seed)[0], count, walk) for seed in CALIBRATIONS
                ]
                values = [decibels(squares(images, full)).mean() for images in drawn]
                note = f"calibrations {', '.join(f'{v:.2f}' for v in values)}; {count} digits, rank {RANK}"
                record("families layers", f"{family} {name}, {what}", np.mean(values), "dB", note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("methods", "times", "layers"))
    parser.add_argument("--ckpt", nargs="+", default=[f"{k}={v}" for k, v in MODELS.items()], metavar="FAMILY=FILE")
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--data", default="digits", help="training images: digits, or a file of train.py --data")
    args = parser.parse_args()
    checkpoints = dict(each.split("=", 1) for each in args.ckpt)
    if args.what == "methods":
        methods(checkpoints, args.count, args.only, args.data)
    elif args.what == "times":
        times(checkpoints, args.count)
    else:
        layers(checkpoints, args.count)


if __name__ == "__main__":
    main()
