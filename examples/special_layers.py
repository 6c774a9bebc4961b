"""What is quantized where a model shares a linear layer, or uses a weight without calling the layer.

    python examples/special_layers.py

A layer with two names is quantized once and stays shared. `nn.MultiheadAttention` reads its weights itself: its
projections stay in full precision, and the report says so.
"""

import torch
from torch import Tensor, nn

import svdit


class Model(nn.Module):
    """Attention, and two steps through the same layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, num_heads=4, batch_first=True)
        self.first = nn.Linear(64, 64)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x)[0]  # (N, T, 64)
        x = x + torch.tanh(self.first(x))
        return x + torch.tanh(self.second(x))


torch.manual_seed(0)
model, batches = Model().eval(), [torch.randn(4, 16, 64) for _ in range(8)]
with torch.no_grad():
    original = model(batches[0])
    report = svdit.quantize_(model, "w8a8", batches)
    error = float((model(batches[0]) - original).norm() / original.norm())

assert model.first is model.second
print(*(f"{line.name}: quantized" for line in report.layers), *report.warnings, sep="\n")
print(f"relative error of the output: {error:.4f}")
