"""How should adaLN be rounded? Every model with its blocks at W8A8 or W4A8, and adaLN in one format after another.

    python benchmarks/conditioning.py [--ckpt DiT=digits CIFAR=cifar10 …] [--count 48] [--presets w8a8 w4a8]

PSNR to full precision as in families.py, means over two calibrations. Its difference to adaLN in floats is that of
images before they are rounded to 256 levels, which hides small errors; its error is paired by image. Beside it the
error of the modulations on other pairs (t, y) than the calibration's, relative to their variance: the mean, which all
steps and tokens share, and the variance around it.
"""

import argparse
import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from bench_end_to_end import BATCH, CPU, calibration, decibels, squares
from families import CALIBRATIONS, MODELS, walk_of, with_rank
from record import record
from torch import Tensor

from svdit.checkpoints.store import load_model
from svdit.diffusion.noise import image_labels, image_noise
from svdit.images import to_uint8
from svdit.kernels.formats import Format
from svdit.model.dit import DiT
from svdit.quant.config import ADALN, CONDITIONING, PLAIN, RECIPES, Recipe
from svdit.quant.linear import linears, swap
from svdit.quant.observe import Statistics, observe
from svdit.quant.solve import quantize_linear
from svdit.runtime.accelerate import accelerate
from svdit.sampling.batch import generate
from svdit.sampling.calibration import CONDITIONS, show_conditions

INT4 = ADALN["int4"] or PLAIN
FORMATS: dict[str, Recipe | None] = {
    "floats": None,
    "INT8, nearest": PLAIN,
    "INT8 g64, nearest": replace(PLAIN, weight=Format(8, 64, "bf16")),
    "INT8, nearest, centred": replace(PLAIN, centre=True),
    "INT8, GPTQ": replace(CONDITIONING, centre=False),
    "INT8, GPTQ, centred": CONDITIONING,
    "INT4, GPTQ": replace(INT4, centre=False),
    "INT4, GPTQ, centred": INT4,
}


def adaln(model: DiT) -> list[str]:
    """The names of the layers that compute modulations."""
    return [name for name, _ in linears(model) if "adaLN" in name]


def quantized(model: DiT, recipes: dict[str, Recipe], statistics: dict[str, Statistics]) -> DiT:
    """A copy of a model with these layers quantized."""
    model = copy.deepcopy(model)
    layers = dict(linears(model))
    swap(model, {name: quantize_linear(name, layers[name], r, statistics[name])[0] for name, r in recipes.items()})
    return model


def conditions(model: DiT, name: str) -> Tensor:
    """Inputs (M, I) of an adaLN layer, of other pairs (t, y) than a calibration's."""
    inputs: list[Tensor] = []
    with model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        show_conditions(model, 99, CONDITIONS)
    return inputs[0].double()


def modulation_errors(model: DiT, other: DiT) -> tuple[float, float]:
    """Means over layers of the squared mean error and of the error's variance, relative to the variance, in dB."""
    parts = []
    for name in adaln(model):
        x, linear = conditions(model, name), dict(linears(model))[name]
        y = x @ linear.weight.double().T + linear.bias
        error = other.get_submodule(name)(x.float()) - y
        power = (y - y.mean(0)).square().sum(1).mean()
        mean = error.mean(0).square().sum()
        parts.append([float(mean / power), float((error - error.mean(0)).square().sum(1).mean() / power)])
    mean, variance = 10 * np.log10(np.mean(parts, axis=0) + 1e-30)
    return mean, variance


def models(checkpoint: str, preset: str) -> Iterator[tuple[DiT, DiT, dict[str, Statistics]]]:
    """For each calibration the float model, one with quantized blocks, and the statistics of adaLN's inputs."""
    for seed in CALIBRATIONS:
        model = load_model(checkpoint)
        config, names = with_rank(RECIPES[preset], model), [name for name, _ in linears(model)]
        recipes = {name: recipe for name in names if (recipe := config.recipe(name))}
        statistics = observe(model, recipes, calibration(model, seed))
        blocks = {name: recipe for name, recipe in recipes.items() if "adaLN" not in name}
        yield model, quantized(model, blocks, statistics), {name: statistics[name] for name in adaln(model)}


def draw(model: DiT, count: int) -> Tensor:
    """Images (N, C, H, W) in [−1, 1], from the noise of families.py."""
    walk, images = walk_of(model), list[Tensor]()
    for start in range(0, count, BATCH):
        indices = range(start, min(start + BATCH, count))
        labels = image_labels(1, indices, model.config.num_classes)
        images.append(generate(model, labels, walk, noise=image_noise(1, indices, model.input_shape, CPU)))
    return torch.cat(images).clamp(-1, 1)


def errors(images: Tensor, full: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The mean squared error (N,) of each image, in levels of 255, with and without rounding to them."""
    exact = (images - full).double().square().flatten(1).mean(1) * 127.5**2
    return squares(to_uint8(images), to_uint8(full)), exact.numpy()


@torch.no_grad()
def measure(family: str, checkpoint: str, preset: str, count: int, formats: list[str]) -> None:
    """All formats of adaLN for one model and one preset of its blocks."""
    full = draw(load_model(checkpoint), count)
    images, modulations = [{name: [] for name in formats} for _ in range(2)]
    for model, blocks, statistics in models(checkpoint, preset):
        for name in formats:
            recipe = FORMATS[name]
            other = quantized(blocks, dict.fromkeys(statistics, recipe) if recipe else {}, statistics)
            modulations[name].append(modulation_errors(model, other))
            images[name].append(errors(draw(accelerate(other), count), full))
    baseline = decibels(np.array(images[formats[0]])[:, 1])
    for name in formats:
        (rounded, exact), (mean, variance) = np.array(images[name]).swapaxes(0, 1), np.mean(modulations[name], axis=0)
        difference = (decibels(exact) - baseline).mean(0)
        note = f"pooled {decibels(rounded.mean()):.2f}; minus floats {difference.mean():.2f} "
        note += f"se {difference.std(ddof=1) / count**0.5:.2f}; mean {mean:.1f}, variance {variance:.1f}; "
        note += f"{count} images, 50 steps, cfg 1.5, {len(CALIBRATIONS)} calibrations"
        record("conditioning", f"{family} {preset}, {name}", decibels(rounded).mean(), "dB", note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", nargs="+", default=[f"{k}={v}" for k, v in MODELS.items()], metavar="FAMILY=FILE")
    parser.add_argument("--presets", nargs="+", default=["w8a8", "w4a8"], choices=RECIPES)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--count", type=int, default=48)
    args = parser.parse_args()
    for family, checkpoint in (each.split("=", 1) for each in args.ckpt):
        for preset in args.presets:
            measure(family, checkpoint, preset, args.count, args.formats)


if __name__ == "__main__":
    main()
