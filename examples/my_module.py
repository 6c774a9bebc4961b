"""Quantize the linear layers of any module, save it, and load it into a new one.

python examples/my_module.py
"""

import torch
from torch import nn

import svdit


def build() -> nn.Sequential:
    """The model in full precision."""
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64), nn.Linear(64, 10)).eval()


torch.manual_seed(0)
model = build()
batches = [torch.randn(64, 64) for _ in range(16)]  # typical inputs; a function that runs the model works too
original = model(batches[0])

report = svdit.quantize_(model, "w8a8", batches, skip=["4"])  # the head, "4", stays in full precision
svdit.save(model, "quantized.safetensors")

model = svdit.accelerate(svdit.load("quantized.safetensors", build()))  # in another process, for example
with torch.no_grad():
    error = float((model(batches[0]) - original).norm() / original.norm())

for line in report.layers:
    print(f"{line.name}: {line.weight} weights, {line.act} activations, rank {line.rank}, {line.sqnr:.1f} dB")
print(f"relative error of the output: {error:.4f}")
