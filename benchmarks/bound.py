"""The least time that the arithmetic of a forward pass takes: every operation at the peak rate of its kind.

INT8 products of the blocks at the INT8 peak; low-rank branches at the INT16 peak and attention at the bf16 peak, or at
fp32's on processors without such products; adaLN, embedders and the last layer at the fp32 peak. Reading
and writing, norms, activations, softmax, transforms and codes are not counted.
"""

from collections import Counter

import torch
from timing import Median, median
from torch import nn

from svdit.kernels.cpu import choice, ffi
from svdit.model.dit import DiT
from svdit.model.layers import Block
from svdit.quant.linear import quantized_layers

BRANCHES = {torch.int16: "int16", torch.bfloat16: "low", torch.float32: "fp32"}


def operations(model: DiT, batch: int) -> Counter[str]:
    """Operations (a multiply-add is two) of a forward pass of a quantized model, by kind of peak of `ffi.PEAKS`."""
    config, count = model.config, Counter[str]()
    tokens = (config.input_size // config.patch_size) ** 2
    for name, layer in quantized_layers(model).items():
        rows = batch * (length(model, name, tokens) if layer.spec.act else 1)
        I, O, R = layer.in_features, layer.out_features, layer.spec.rank
        count["int8" if layer.spec.act else "fp32"] += 2 * rows * I * O
        count[BRANCHES[choice.kernels().branch_dtype]] += 2 * rows * R * (I + O)
    for i, block in enumerate(model.blocks):
        if isinstance(block, Block):
            count["low"] += 4 * batch * length(model, f"blocks.{i}", tokens) ** 2 * config.hidden_size
    for name, module in model.named_modules():
        rows = batch * (tokens if name.startswith(("x_embedder", "final_layer.linear")) else 1)
        if isinstance(module, nn.Linear | nn.Conv2d):
            count["fp32"] += 2 * rows * module.weight.numel()
    return count


def length(model: DiT, name: str, tokens: int) -> int:
    """The tokens of an image in the block that the layer `name` belongs to."""
    inside = name.startswith("blocks.") and int(name.split(".")[1]) >= model.config.context_start
    return tokens + (model.config.context_tokens if inside else 0)


class Bound:
    """Measures the peaks in every round of `timing.measure`, as one of its candidates."""

    def __init__(self, kernels: ffi.Kernels) -> None:
        self.kernels, self.rounds = kernels, list[dict[str, float]]()

    def __call__(self) -> None:
        self.rounds.append({kind: ffi.peak(self.kernels, kind, 500_000) for kind in ffi.peaks(self.kernels)})

    def share(self, count: Counter[str], times: list[float]) -> Median:
        """The bound of `operations` in % of the measured times, both of the same round; the median."""
        rounds = zip(self.rounds[-len(times) :], times, strict=True)
        return median([100 * sum(count[kind] / peaks[kind] for kind in count) / seconds for peaks, seconds in rounds])
