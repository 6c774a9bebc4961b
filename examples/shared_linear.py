"""A linear under two names (tied weights) is quantized once and stays shared.

python examples/shared_linear.py
"""

import torch
from torch import Tensor, nn

import svdit


class Tied(nn.Module):
    """Two residual steps through the same linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.first(x))  # (N, 64)
        return x + torch.tanh(self.second(x))


torch.manual_seed(0)
model, batches = Tied().eval(), torch.randn(16, 64, 64)
with torch.no_grad():
    before = model(batches)
    config = svdit.QuantConfig((svdit.Rule("*", svdit.recipe_for("w8a8", rank=8)),))
    report = svdit.quantize_(model, config, lambda m: [m(x) for x in batches])
    error = float((model(batches) - before).norm() / before.norm())

assert model.first is model.second
print(f"{len(report.layers)} layer quantized; relative error of the output: {error:.4f}")
