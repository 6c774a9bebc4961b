"""Every named model has exactly the published names and shapes."""

import hashlib
import json

import pytest
import torch
from conftest import GOLDEN

from svdit.errors import UserError
from svdit.model.zoo import CONFIGS, DiT_models, config_for

PUBLISHED = json.loads((GOLDEN / "model_shapes.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        state = DiT_models[name](input_size=32, num_classes=1000).state_dict()
    lines = "\n".join(sorted(f"{key} {list(tensor.shape)}" for key, tensor in state.items()))
    assert len(state) == PUBLISHED[name]["tensors"]
    assert sum(tensor.numel() for tensor in state.values()) == PUBLISHED[name]["params"]
    assert hashlib.sha256(lines.encode()).hexdigest() == PUBLISHED[name]["sha256_of_name_shape_lines"]


def test_dit_xl_2_shape_by_shape() -> None:
    with torch.device("meta"):
        state = DiT_models["DiT-XL/2"]().state_dict()
    expected = json.loads((GOLDEN / "dit_xl_2_shapes.json").read_text())
    assert {key: list(tensor.shape) for key, tensor in state.items()} == expected


def test_published_names_are_all_there() -> None:
    assert set(PUBLISHED) <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_can_be_built_with_other_sizes(name: str) -> None:
    with torch.device("meta"):
        model = DiT_models[name](input_size=64, in_channels=3, num_classes=7, learn_sigma=False)
    assert model.out_channels == 3
    assert model.null_class == 7


def test_unknown_names_and_options() -> None:
    with pytest.raises(UserError, match="'DiT-M/2'; choose one of DiT-XL/2"):
        config_for("DiT-M/2")
    with pytest.raises(TypeError, match="no option pooling"):
        config_for("DiT-S/2", pooling=True)
