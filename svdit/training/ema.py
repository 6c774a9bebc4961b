"""The exponential moving average of the weights: ema ← d·ema + (1 − d)·weights after every training step.

d rises to its final value as min(decay, (1 + step) / (10 + step)), which discounts the random initialization.
"""

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


@torch.no_grad()
def update_(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move `ema` towards `model`, in place; `step` counts from 1. Parameters that are not trained keep their value."""
    pairs = [(a, b) for a, b in zip(ema.parameters(), model.parameters(), strict=True) if b.requires_grad]
    average = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))  # type: ignore[no-untyped-call]
    average([a for a, _ in pairs], [b for _, b in pairs], None)
