"""Reproduce the table of quality in README.md: size of each preset, and PSNR of images of the digits model.

    python examples/reproduce_table.py [IMAGES]

IMAGES is 256 by default, which needs minutes. The README's numbers are means of 2 or 3 calibrations, of other labels.
"""

import sys

from torch import Tensor

import svdit

PRESETS = ("w8a8", "w4a8", "w4a4", "svdquant", "svdquant-w4a4")
count = int(sys.argv[1]) if len(sys.argv) > 1 else 256


def sample(model: svdit.DiT) -> Tensor:
    """DDIM in 50 steps with guidance 1.5, rounded to 256 levels as in a file: (N, 1, 8, 8)."""
    x = svdit.sample(model, [i % 10 for i in range(count)], sampler="ddim", steps=50, cfg_scale=1.5)
    return (127.5 * x + 127.5).round() / 127.5 - 1


original = sample(svdit.load("digits"))
psnr = {}
for preset in PRESETS:
    model = svdit.load("digits")
    report = svdit.quantize_(model, svdit.recipe_for(preset, rank=8))
    psnr[preset] = svdit.psnr(sample(svdit.accelerate(model)), original)
    print(f"{preset:14} {report.bytes_after / 1e6:.2f} MB  {psnr[preset]:.1f} dB", flush=True)
