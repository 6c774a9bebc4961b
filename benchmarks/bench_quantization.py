"""SQNR of layer outputs on a synthetic DiT block: the published algorithm, the recipe, and intermediate variants.

    python benchmarks/bench_quantization.py [--layers qkv fc2] [--profiles moderate plain]

Width 576, rank 16, groups of 64; calibrated on 64 pairs (t, y), measured on 16 held-out pairs. A full run takes 30
minutes.
"""

import argparse
import math
from dataclasses import replace

import torch
from record import record
from synthetic import PROFILES, Block
from torch import nn

from svdit.kernels.formats import ACT_FORMATS, Format
from svdit.quant.config import RECIPES, Recipe, dit_config
from svdit.quant.observe import Statistics
from svdit.quant.solve import quantize_linear

RANK = 16
PUBLISHED = replace(RECIPES["svdquant-w4a4"], rank=RANK, factor_dtype="float32", smoothing=19)
RECIPE = replace(RECIPES["w4a4"], rank=RANK)
INT8 = ACT_FORMATS["int8"]

METHODS: dict[str, Recipe] = {
    "w4a4 rtn": replace(PUBLISHED, low_rank="none", smoothing=0),
    "w4a4 smoothing, rtn": replace(PUBLISHED, low_rank="none"),
    "w4a4 svdquant": PUBLISHED,
    "w4a4 svdquant, gptq": replace(PUBLISHED, rounding="gptq"),
    "w4a4 qera": replace(PUBLISHED, low_rank="correction"),
    "w4a4 recipe": RECIPE,
    "w4a4 recipe, no branch": replace(RECIPE, low_rank="none"),
    "w4a4 recipe, no hadamard": replace(RECIPE, hadamard=0),
    "w4a4 recipe, no centring": replace(RECIPE, centre=False),
    "w4a4 recipe, no gptq": replace(RECIPE, rounding="nearest"),
    "w4a8 svdquant, gptq, per channel": replace(PUBLISHED, weight=Format(4), act=INT8, rounding="gptq"),
    "w4a8 recipe, per channel": replace(RECIPES["w4a8-channel"], rank=RANK),
    "w4a8 svdquant, gptq": replace(PUBLISHED, act=INT8, rounding="gptq"),
    "w4a8 recipe": replace(RECIPES["w4a8"], rank=RANK),
    "w8a8 svdquant, gptq": replace(PUBLISHED, weight=Format(8), act=INT8, rounding="gptq"),
    "w8a8 recipe": replace(RECIPES["w8a8"], rank=RANK),
}


def sqnr(W: torch.Tensor, calibration: torch.Tensor, test: torch.Tensor, recipe: Recipe) -> float:
    """SQNR in dB on held-out inputs. W (O, I), calibration and test (M, I)."""
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight.data = W.clone()
    statistics = Statistics.empty(W.shape[1], torch.device("cpu"))
    statistics.add(calibration, torch.Generator().manual_seed(0))
    layer, _ = quantize_linear("layer", linear, recipe, statistics)
    y = test @ W.T
    return 10 * math.log10(float(y.square().sum() / (layer(test) - y).square().sum()))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="+", default=["qkv", "proj", "fc1", "fc2"])
    parser.add_argument("--profiles", nargs="+", default=["moderate"], choices=PROFILES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    args = parser.parse_args()
    for profile in args.profiles:
        block = Block(profile=profile)
        calibration, test = block.inputs(64, 96, 1), block.inputs(16, 96, 2)
        for layer in args.layers:
            where = f"blocks.0.{'mlp' if layer.startswith('fc') else 'attn'}.{layer}"
            for name in args.methods:
                recipe = dit_config(METHODS[name]).recipe(where)
                assert recipe is not None
                value = sqnr(block.weights[layer], calibration[layer], test[layer], recipe)
                record("synthetic", f"{profile} {layer} {name}", value, "dB", f"rank {RANK}")


if __name__ == "__main__":
    main()
