"""Nine transformers of diffusers, tiny and random: the SQNR of their output with the default rules.

    python benchmarks/pipelines.py [--models DiT Flux …]

Random weights show that every architecture is quantized and accelerated correctly, and what quantizing the embedders
and the last layer costs. They do not show the quality of images: activations of trained models have outliers.
"""

import argparse
import sys
from pathlib import Path

import torch
from record import record
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from tiny_diffusers import MODELS, Inputs, generator, output

from svdit import accelerate
from svdit.integrations.rules import plan_for
from svdit.quant.config import QuantConfig, Rule, recipe_for
from svdit.quant.linear import quantized_layers
from svdit.quant.quantize import quantize_
from svdit.runtime.linear import FastLinear

CALLS, BATCH, FRESH = 16, 16, 10**6
PRESETS = ("w8a8", "w4a8", "w4a4")


def sqnr(noisy: Tensor, clean: Tensor) -> float:
    """10 log10 of signal to noise."""
    return float(10 * torch.log10(clean.square().sum() / (noisy - clean).square().sum()))


def measure(name: str, preset: str, everything: bool = False) -> None:
    """Record one model: quantized by the default rules, or with `everything` in all of its linears."""
    tiny = MODELS[name]
    model, fresh = tiny.model(), tiny.inputs(2 * BATCH, generator(FRESH))
    batches: list[Inputs] = [tiny.inputs(BATCH, generator(i)) for i in range(CALLS)]
    clean = output(model, fresh)
    plan = plan_for(model, preset)
    config = QuantConfig((Rule("*", recipe_for(preset)),)) if everything else plan.config

    def loop(model: nn.Module) -> None:
        for inputs in batches:
            output(model, inputs)

    quantize_(model, config, loop)
    layers, left = len(quantized_layers(model)), 0 if everything else len(plan.kept)
    noisy = output(model, fresh)
    note = f"{layers} layers, {left} left"
    if not everything:  # some models read the type of a parameter of their embedders, and packed layers have none
        fast = output(accelerate(model), fresh)
        packed = sum(isinstance(module, FastLinear) and not module.reason for module in model.modules())
        note += f", {packed} packed, accelerated {sqnr(fast, clean):.2f} dB"
    record("pipelines", f"{name}, {preset}{', every linear' * everything}", sqnr(noisy, clean), "dB", note)


def main() -> None:
    """Measure the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, help="default: all")
    for name in parser.parse_args().models:
        for preset in PRESETS:
            measure(name, preset)
        measure(name, "w8a8", everything=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
