"""What the CUDA backend packs stays on the GPU. Its kernels need a real one: see `tests/kernels/test_cuda.py`."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import randomize
from devices.fake_cuda import FakeCuda
from torch import Tensor

from svdit.kernels.cuda import backend
from svdit.model.dit import DiT, DiTConfig
from svdit.quant.config import dit_config, recipe_for
from svdit.quant.linear import quantized_layers
from svdit.quant.quantize import quantize_

pytest.importorskip("triton")


def held(x: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that an object's attributes, containers and closures refer to."""
    if isinstance(x, Tensor):
        yield x
    elif id(x) not in seen and not isinstance(x, (type, str, int, float)):
        seen.add(id(x))
        parts = list(x.values()) if isinstance(x, dict) else list(x) if isinstance(x, (list, tuple)) else []
        parts += [cell.cell_contents for cell in getattr(x, "__closure__", None) or ()]
        parts += getattr(x, "__dict__", {}).values()
        for part in parts:
            yield from held(part, seen)


@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w4a8-channel", "w4a4", "w4a16", "w8a16", "fp8"])
def test_packed_layers_are_on_the_device(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    model = randomize(DiT(DiTConfig(4, 2, 4, hidden_size=64, depth=1, num_heads=2, mlp_ratio=2, num_classes=5)))
    recipe = recipe_for(preset, smoothing=0, centre=False, search_scales=False, rounding="nearest", low_rank="svd")
    quantize_(model, dit_config(recipe))
    with FakeCuda():
        model.to("cuda")
        for name, layer in quantized_layers(model).items():
            packed = backend.pack(layer.layer())
            assert packed is not None, name
            found = list(held(packed, set()))
            assert found and all(x.is_cuda for x in found), name
