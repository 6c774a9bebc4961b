"""The exponential moving average of the weights: ema ← d·ema + (1 − d)·weights after every step.

d rises to its final value as min(decay, (1 + step) / (10 + step)), so that the random start is soon forgotten.
"""

import torch
from torch import nn


@torch.no_grad()
def update(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move `ema` towards `model`, in place; `step` counts from 1."""
    d = min(decay, (1 + step) / (10 + step))
    pairs = [(a, b) for a, b in zip(ema.parameters(), model.parameters(), strict=True) if b.requires_grad]
    torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - d)
