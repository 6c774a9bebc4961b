"""Configurations are inferred from shapes."""

from pathlib import Path

import pytest
import torch

from svdit.checkpoints.infer import config_from_shapes
from svdit.errors import UserError
from svdit.model.dit import DiT
from svdit.model.zoo import CONFIGS, config_for


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_named_configuration_is_inferred(name: str, learn_sigma: bool) -> None:
    config = config_for(name, learn_sigma=learn_sigma, input_size=16, in_channels=3, num_classes=7)
    with torch.device("meta"):
        model = DiT(config)
    assert config_from_shapes(model.state_dict(), Path("file")) == config


@pytest.mark.parametrize("shape", [(), (0, 4, 2, 2), (64, 0, 2, 2), (64, 4, 0, 0)])
def test_shapes_of_no_dit_are_an_error(shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        state = {**DiT(config_for("DiT-S/2")).state_dict(), "x_embedder.proj.weight": torch.empty(shape)}
    with pytest.raises(UserError, match="file is not a checkpoint of a DiT: its tensors have other shapes"):
        config_from_shapes(state, Path("file"))
