"""Layers and inputs that are not kind: outlier channels, a mean, correlated features."""

import pytest
import torch
from helpers import hard_inputs
from torch import nn

from svdit.quant.observe import Statistics


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(128, 96)
    with torch.no_grad():
        layer.weight[:, :8] *= 3
    return layer


@pytest.fixture
def statistics() -> Statistics:
    gathered = Statistics.empty(128, torch.device("cpu"))
    for part in hard_inputs(4096).split(500):
        gathered.add(part, torch.Generator().manual_seed(len(part)))
    return gathered
