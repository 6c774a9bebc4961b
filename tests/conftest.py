"""What several test files share: the published implementation's outputs, and models that are not zero."""

import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import hard_inputs
from hypothesis import HealthCheck, settings
from safetensors import safe_open
from torch import nn

from svdit.kernels.cpu import ffi
from svdit.model.dit import DiT, DiTConfig
from svdit.quant.observe import Statistics

GOLDEN = Path(__file__).parent / "golden"
torch.set_num_threads(1)  # tests run two processes side by side
os.environ.setdefault("SVDIT_ISA", ffi.isas()[0])  # the same in every run, where a measured choice may differ
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


class Golden:
    """One published tiny model: `config`, `model`, and `[key]` for a tensor."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"{name}.weights.safetensors", "pt") as file:
            config: dict[str, Any] = json.loads(file.metadata()["config"])
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        del config["class_dropout_prob"]
        self.arrays = np.load(GOLDEN / f"{name}.npz")
        self.model = DiT(DiTConfig(**config)).eval()
        self.model.load_state_dict(weights)

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])


@pytest.fixture(scope="session", params=["dit_learn_sigma", "dit_fixed_sigma"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="session")
def golden_learned() -> Golden:
    return Golden("dit_learn_sigma")


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill every parameter: a freshly initialised DiT outputs zero, and tests on it are vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model.eval()


@pytest.fixture
def tiny() -> DiT:
    """Random weights, 64 wide, 2 blocks: every quantization format applies."""
    config = DiTConfig(input_size=4, patch_size=2, in_channels=4, hidden_size=64, depth=2, num_heads=2, num_classes=5)
    model = randomize(DiT(config))
    assert isinstance(model, DiT)
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖"""
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.fixture
def linear() -> nn.Linear:
    """Not kind: its first inputs weigh three times as much."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 96)
    with torch.no_grad():
        layer.weight[:, :8] *= 3
    return layer


@pytest.fixture(scope="session")
def gathered() -> Statistics:
    """Of inputs with outlier channels, a mean and correlated features."""
    gathered = Statistics.empty(128, torch.device("cpu"))
    for part in hard_inputs(4096).split(500):
        gathered.add(part, torch.Generator().manual_seed(len(part)))
    return gathered


@pytest.fixture
def statistics(gathered: Statistics) -> Statistics:
    """A copy of them, which a test may change."""
    return deepcopy(gathered)
