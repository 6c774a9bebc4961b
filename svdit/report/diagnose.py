"""The numbers behind the figures of `svdit quantize`'s report.

Each quantized layer is compared with its original on held-out inputs: those of a few sampling steps of the original
model, on images outside the calibration set. The work is bounded: half a minute for DiT-XL/2 on two cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from svdit.report.tables import place

if TYPE_CHECKING:
    from torch import Tensor, nn

    from svdit.model.dit import DiT
    from svdit.quant.report import LayerReport

STEPS, IMAGES = (4, 10), (1, 8)  # least and most sampling steps and images
WORK = 1.5e12  # FLOPs in the linear layers of the blocks
ROWS = 16  # tokens per image and step
FEW = 4  # layers with spectra and histograms
HALVES = ("conditional", "unconditional")


def measure(
    model: DiT, original: DiT, lines: Sequence[LayerReport], cfg_scale: float | None, seed: int
) -> dict[str, Any]:
    """Errors by layer, time and guidance half, spectra, smoothing scales and input histograms, as JSON."""
    import torch

    from svdit.quant.linear import quantized_layers
    from svdit.quant.quantize import linear_of
    from svdit.report import measurements as m

    layers, linears = quantized_layers(model), {line.name: linear_of(original, line.name) for line in lines}
    images, steps = affordable(original)
    loop = held_out_loop(images, steps, cfg_scale, seed)
    inputs = m.layer_inputs(original, layers, loop, time_and_half(original), rows=ROWS * images)
    errors = {name: m.relative_errors(linears[name], layer, inputs[name]) for name, layer in layers.items()}
    power = {name: sum(error**2 for error in groups.values()) / len(groups) for name, groups in errors.items()}
    worst = sorted(layers, key=lambda name: -power[name])
    branched = [name for name in worst if layers[name].spec.rank and linears[name].weight.any()]  # zeros: no spectrum
    rounded = [name for name in worst if layers[name].spec.act][:FEW]
    pairs = {name: m.histograms(layers[name], torch.cat(list(inputs[name].values()))) for name in rounded}
    return {
        "measured_on": {"images": images, "steps": steps, "cfg_scale": cfg_scale, "seed": seed},
        "sqnr": {name: -10 * math.log10(noise) if noise else None for name, noise in power.items()},
        **by_time(errors, original),
        "spectra": {name: asdict(m.spectrum(linears[name], layers[name])) for name in one_of_each_kind(branched)[:FEW]},
        "smoothing": {
            line.name: {"alpha": line.alpha, "beta": line.beta, "scale_quantiles": quantiles}
            for line in lines
            if (quantiles := m.scale_quantiles(layers[line.name]))
        },
        "activations": {name: {"before": asdict(a), "after": asdict(b)} for name, (a, b) in pairs.items()},
    }


def affordable(model: DiT) -> tuple[int, int]:
    """Images and sampling steps within WORK, with both guidance halves, and Heun's two calls a step."""
    from torch import nn

    from svdit.sampling.calibration import calibration_sampling

    calls = 2 if calibration_sampling(model.config, STEPS[0]).sampler == "heun" else 1
    tokens = (model.config.input_size // model.config.patch_size) ** 2 + model.config.context_tokens
    linears = [
        layer for name, layer in model.blocks.named_modules() if isinstance(layer, nn.Linear) and "ada" not in name
    ]
    pairs = int(WORK / (2 * calls * tokens * sum(layer.weight.numel() for layer in linears)))
    steps = min(max(pairs, STEPS[0]), STEPS[1])
    return min(max(pairs // steps, IMAGES[0]), IMAGES[1]), steps


def held_out_loop(images: int, steps: int, cfg_scale: float | None, seed: int) -> Callable[[nn.Module], None]:
    """A forward loop: sampling as for calibration, from held-out noise, random classes."""
    import torch

    from svdit.diffusion.noise import image_labels, image_noise
    from svdit.model.dit import DiT
    from svdit.sampling.batch import generate
    from svdit.sampling.calibration import calibration_sampling
    from svdit.sampling.numbers import REPORTED_LAYERS

    def loop(model: nn.Module) -> None:
        assert isinstance(model, DiT)
        indices = range(REPORTED_LAYERS, REPORTED_LAYERS + images)
        noise = image_noise(seed, indices, model.input_shape, model.pos_embed.device)
        labels = image_labels(seed, indices, model.config.num_classes)
        with torch.no_grad():
            generate(model, labels, calibration_sampling(model.config, steps, cfg_scale), noise=noise)

    return loop


def ticks(model: DiT) -> int:
    """Groups are integers: a flow's t, from 0 to 1, is counted in ten-thousandths, DDPM's timesteps as they are."""
    return 10_000 if model.config.is_flow else 1


def time_and_half(model: DiT) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A group (N,) for each row of a batch: 2 t with a class, 2 t + 1 without."""
    return lambda x, t, y: 2 * (ticks(model) * t).round().long() + (y == model.null_class)


def by_time(errors: dict[str, dict[int, float]], model: DiT) -> dict[str, Any]:
    """Times from noise to data, and for each guidance half the errors of every layer at them; None: no call."""
    keys = {key for groups in errors.values() for key in groups}
    times = sorted({key // 2 for key in keys}, reverse=model.config.time != "noise_to_data")
    table = {
        half: {name: [groups.get(2 * time + odd) for time in times] for name, groups in errors.items()}
        for odd, half in enumerate(HALVES)
        if any(key % 2 == odd for key in keys)
    }
    shown = [time / ticks(model) for time in times] if model.config.is_flow else times
    return {"time": model.config.time, "timesteps": shown, "errors": table}


def one_of_each_kind(names: Iterable[str]) -> list[str]:
    """The first name of each kind of layer."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(place(name)[0], name)
    return list(first.values())


def thinned(curve: Sequence[tuple[int, float]], most: int = 200) -> list[tuple[int, float]]:
    """At most `most` points of a curve, including both ends."""
    step = max(1, -(-len(curve) // (most - 1)))
    return [*curve[:-1:step], *curve[-1:]]
