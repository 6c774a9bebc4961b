"""Quantize the linears of any module in place, save and load it: one rule per name pattern, the first match decides.

python examples/any_module.py
"""

import torch
from torch import nn

import svdit

torch.manual_seed(0)


def build() -> nn.Sequential:
    """The model in full precision."""
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64), nn.Linear(64, 10)).eval()


model, batches = build(), torch.randn(16, 64, 64)  # calibration data: 16 batches of 64 rows

with torch.no_grad():
    before = model(batches)
    config = svdit.QuantConfig((svdit.Rule("4", None), svdit.Rule("*", svdit.recipe_for("w8a8", rank=8))))
    report = svdit.quantize_(model, config, lambda m: [m(x) for x in batches])  # the head, "4", stays in fp32
    svdit.save_quantized(model, "quantized.safetensors")
    model = svdit.load_quantized(build(), "quantized.safetensors")  # in another process, for example
    model = svdit.accelerate(model)  # packed for this processor
    error = float((model(batches) - before).norm() / before.norm())

for line in report.layers:
    print(f"{line.name}: {line.weight} weights, {line.act} activations, rank {line.rank}, {line.sqnr:.1f} dB")
print(f"relative error of the output: {error:.4f}")
