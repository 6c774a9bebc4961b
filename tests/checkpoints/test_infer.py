"""Every named configuration is read back off its shapes."""

from pathlib import Path

import pytest
import torch

from svdit.checkpoints.infer import config_from_shapes
from svdit.model.dit import DiT
from svdit.model.zoo import CONFIGS, config_for


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_tell_the_configuration(name: str, learn_sigma: bool) -> None:
    config = config_for(name, learn_sigma=learn_sigma, input_size=16, in_channels=3, num_classes=7)
    with torch.device("meta"):
        model = DiT(config)
    assert config_from_shapes(model.state_dict(), Path("file")) == config
