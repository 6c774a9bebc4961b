"""nn.MultiheadAttention reads its weights without calling a linear: it is skipped, and the report says so.

python examples/multihead_attention.py
"""

import torch
from torch import nn

import svdit

torch.manual_seed(0)
model = nn.TransformerEncoderLayer(64, nhead=4, dim_feedforward=256, batch_first=True).eval()
batches = torch.randn(8, 4, 16, 64)  # calibration data: 8 batches (4, 16, 64)
with torch.no_grad():
    before = model(batches[0])
    config = svdit.QuantConfig((svdit.Rule("*", svdit.recipe_for("w8a8", rank=8)),))
    report = svdit.quantize_(model, config, lambda m: [m(x) for x in batches])
    error = float((model(batches[0]) - before).norm() / before.norm())

print(*(line.name for line in report.layers), *report.warnings, sep="\n")
print(f"relative error of the output: {error:.4f}")
