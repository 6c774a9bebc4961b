"""Configurations are inferred from shapes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svdit.checkpoints.infer import config_from_shapes
from svdit.errors import UserError
from svdit.model.dit import DiT
from svdit.model.zoo import CONFIGS, config_for


@pytest.mark.parametrize("name", CONFIGS)
def test_every_named_configuration_is_inferred(name: str) -> None:
    learn_sigma = not name.startswith("REPA")
    config = config_for(name, learn_sigma=learn_sigma, input_size=64, in_channels=3, num_classes=7)
    with torch.device("meta"):
        state = DiT(config).state_dict()
    claims = {"family": config.family, "rope": config.rope}
    padded = -(-config.mlp_width // 64) * 64 if config.mlp == "swiglu" else 0
    assert config_from_shapes(state, Path("file"), claims) == replace(config, mlp_hidden=padded)


@pytest.mark.parametrize("shape", [(), (0, 4, 2, 2), (64, 0, 2, 2), (64, 4, 0, 0)])
def test_shapes_of_no_dit_are_an_error(shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        state = {**DiT(config_for("DiT-S/2")).state_dict(), "x_embedder.proj.weight": torch.empty(shape)}
    with pytest.raises(UserError, match="file is not a checkpoint of a DiT: its tensors have other shapes"):
        config_from_shapes(state, Path("file"), {"family": "dit"})


def test_as_many_classes_as_rows_leave_no_null_class() -> None:
    with torch.device("meta"):
        state = DiT(config_for("DiT-S/2", num_classes=9)).state_dict()  # 10 rows
    guessed = config_from_shapes(state, Path("file"), {"family": "dit"})
    assert (guessed.num_classes, guessed.has_null_class) == (9, True)
    claimed = config_from_shapes(state, Path("file"), {"family": "dit", "num_classes": 10})
    assert (claimed.num_classes, claimed.has_null_class) == (10, False)
    assert DiT(claimed).y_embedder.embedding_table.weight.shape[0] == 10
