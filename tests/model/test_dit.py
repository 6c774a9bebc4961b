"""The model against the published outputs and against diffusers' own DiT."""

import pytest
import torch
from conftest import Golden, relative

from svdit.errors import UserError
from svdit.model.dit import DiT, DiTConfig


@torch.no_grad()
def test_forward_equals_published(golden: Golden) -> None:
    output = golden.model(golden["x"], golden["t"], golden["y"])
    assert relative(output, golden["forward"]) < 2e-5


def test_null_class_follows_num_classes() -> None:
    model = DiT(DiTConfig(4, 2, 1, 16, 1, 2, num_classes=7))
    assert model.null_class == 7
    assert model.y_embedder.embedding_table.weight.shape == (8, 16)


@pytest.mark.parametrize(
    "bad",
    [{"input_size": 9}, {"hidden_size": 62, "num_heads": 2}, {"num_heads": 5}, {"input_size": 1}, {"patch_size": 0}],
)
def test_impossible_shapes_are_sentences(bad: dict[str, int]) -> None:
    good = {"input_size": 8, "patch_size": 2, "hidden_size": 64, "num_heads": 2}
    with pytest.raises(UserError, match="choose a multiple"):
        DiTConfig(**{**good, **bad})


def test_fresh_model_outputs_zero_and_has_the_papers_initialization() -> None:
    model = DiT(DiTConfig(4, 2, 3, 64, 2, 2, num_classes=3))
    out = model(torch.randn(2, 3, 4, 4), torch.tensor([1, 2]), torch.tensor([0, 3]))
    assert out.shape == (2, 6, 4, 4)
    assert out.abs().max() == 0
    bound = (6 / (64 + 192)) ** 0.5
    weight = model.blocks[0].attn.qkv.weight
    assert 0.95 * bound < weight.abs().max() <= bound
    assert 0.015 < model.t_embedder.mlp[0].weight.std() < 0.025
