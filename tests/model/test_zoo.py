"""Every named model has exactly the published names and shapes."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN

from svdit.errors import UserError
from svdit.model.zoo import CONFIGS, DiT_models, config_for

PUBLISHED = json.loads((GOLDEN / "model_shapes.json").read_text())
FAMILIES = {
    name: json.loads((GOLDEN / name / "model_shapes.json").read_text()) for name in ("sit", "lightningdit", "jit")
}
LISTS = sorted(GOLDEN.glob("repa*/shapes_*.json"))


def shapes(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in state.items()}


def check(shapes: dict[str, list[int]], published: dict[str, Any]) -> None:
    lines = "\n".join(sorted(f"{key} {shape}" for key, shape in shapes.items()))
    assert len(shapes) == published["tensors"]
    assert sum(math.prod(shape) for shape in shapes.values()) == published.get("params", published.get("elements"))
    assert hashlib.sha256(lines.encode()).hexdigest() == published["sha256_of_name_shape_lines"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        state = DiT_models[name](input_size=32, num_classes=1000).state_dict()
    check(shapes(state), PUBLISHED[name])


@pytest.mark.parametrize("name", FAMILIES["sit"])
def test_sits_have_the_shapes_of_published_ones(name: str) -> None:
    model, _, flag = name.partition(" learn_sigma=")
    with torch.device("meta"):
        state = DiT_models[model](learn_sigma=flag == "True").state_dict()
    check(shapes(state), FAMILIES["sit"][name])


@pytest.mark.parametrize("name", FAMILIES["lightningdit"])
def test_lightningdits_have_the_shapes_of_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = DiT_models[name]()
    table = list(model.rotation[0].shape)  # which the published ones store
    check(
        shapes(model.state_dict()) | {f"feat_rope.freqs_{kind}": table for kind in ("cos", "sin")},
        FAMILIES["lightningdit"][name],
    )


@pytest.mark.parametrize("name", FAMILIES["jit"])
def test_jits_have_the_shapes_of_published_ones(name: str) -> None:
    with torch.device("meta"):
        state = DiT_models[name]().state_dict()
    check(shapes(state), FAMILIES["jit"][name])


@pytest.mark.parametrize(("name", "path"), [*zip(("REPA-XL/2", "REPA-XL/1"), LISTS, strict=True)])
def test_repas_have_the_shapes_of_published_ones(name: str, path: Path) -> None:
    published = {key: entry["shape"] for key, entry in json.loads(path.read_text())["tensors"].items()}
    with torch.device("meta"):
        state = DiT_models[name]().state_dict()
    assert shapes(state) == {
        key: shape for key, shape in published.items() if not key.startswith(("projectors.", "bn."))
    }


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
    with pytest.raises(UserError, match="no option of a DiT 'pooling'"):
        config_for("DiT-S/2", pooling=True)
