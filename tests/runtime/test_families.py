"""Accelerated models of every family, on every backend, against the quantized models they were made from."""

from contextlib import nullcontext
from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from conftest import randomize, relative
from layers import CONFIGS, USABLE, model_bound
from torch import Tensor

from svdit.kernels.cpu import choice, ffi
from svdit.model.config import FAMILIES, DiTConfig
from svdit.model.dit import DiT
from svdit.quant.quantize import quantize_
from svdit.runtime.accelerate import accelerate
from svdit.runtime.dit import FastDiT

SMALL = {"input_size": 6, "patch_size": 2, "hidden_size": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
HEAD_80 = {"input_size": 8, "patch_size": 4, "in_channels": 3, "hidden_size": 320, "num_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "dit": {},
    "sit": {},
    "repa": {"qk_norm": "layer"},
    "lightningdit": {"qk_norm": "rms", "mlp_hidden": 128},
    "lightningdit without shift": {"shift": False, "learn_sigma": True, "depth": 1, "mlp_hidden": 128},
    "jit": {**HEAD_80, "bottleneck": 24, "context_tokens": 3, "context_start": 1, "mlp_hidden": 128},
}
N = 5


def quantized(name: str, config: str) -> DiT:
    """Hidden units from 85 on are padding, as where 64 does not divide a published file's."""
    family = name.split()[0]
    model = randomize(DiT(DiTConfig(**{"family": family, **FAMILIES[family], **SMALL, **MODELS[name]})))
    assert isinstance(model, DiT)
    for w12, w3 in ((block.mlp.w12, block.mlp.w3) for block in model.blocks if hasattr(block.mlp, "w12")):
        if w3.in_features == 128:
            w3.weight.data[:, 85:] = 0
            w12.weight.data.view(2, 128, -1)[:, 85:], w12.bias.data.view(2, 128)[:, 85:] = 0, 0
    quantize_(model, CONFIGS[config], lambda model: model(*inputs(model)))
    return model


def inputs(model: DiT) -> tuple[Tensor, Tensor, Tensor]:
    """Images, times and labels, of which two pairs are equal."""
    t = torch.tensor([0.0, 0.3, 0.3, 0.9, 1.0]) if model.config.is_flow else torch.tensor([3, 500, 500, 3, 999])
    x = torch.randn(N, *model.input_shape, generator=torch.Generator().manual_seed(1))
    return x, t, torch.tensor([1, 5, 5, 1, 2])


def test_every_family_is_among_the_models() -> None:
    assert {name.split()[0] for name in MODELS} == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "config"),
    [*product(MODELS, ("w8a8",)), *product(("lightningdit",), ("w4a8", "w4a4", "fp8", "w8a16", "factors"))],
)
@torch.no_grad()
def test_every_backend_computes_the_same(name: str, config: str) -> None:
    model = quantized(name, config)
    x, t, y = inputs(model)
    expected = model(x, t, y)
    assert expected.shape == (N, model.used_channels, *x.shape[2:]) and expected.std() > 0.1
    for backend in USABLE:
        fast = accelerate(deepcopy(model), backend)
        images = fast(x, t, y)
        assert isinstance(fast, FastDiT)
        assert relative(images, expected) < model_bound(backend, 4 if config == "w4a4" else 8), backend
        alone = [fast(*image) for image in zip(x.split(1), t.split(1), y.split(1), strict=True)]
        assert torch.equal(torch.cat(alone), images), backend


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["dit", "jit"])
@torch.no_grad()
def test_checkpoints_of_any_float_type_are_computed_in_fp32(name: str, dtype: torch.dtype) -> None:
    model = quantized(name, "w8a8").to(dtype)
    expected = deepcopy(model).float()(*inputs(model))
    for backend in USABLE:
        images = accelerate(deepcopy(model), backend)(*inputs(model))
        assert images.dtype == torch.float32, backend
        assert relative(images, expected) < model_bound(backend, 8), backend


@pytest.mark.skipif("cpu" not in USABLE, reason="no library")
@torch.no_grad()
def test_torchs_attention_does_not_wait_for_the_end_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized("jit", "w8a8")
    x, t, y = inputs(model)
    chosen = choice.Choice(choice.choice().linears, choice.TORCH)
    monkeypatch.setattr(choice, "choice", lambda: chosen)
    images = accelerate(deepcopy(model), "cpu")(x, t, y)
    assert relative(images, model(x, t, y)) < model_bound("cpu", 8)


@pytest.mark.skipif("cpu" not in USABLE, reason="no library")
@pytest.mark.parametrize(("name", "calls"), [("dit", [10]), ("jit", [5, 5])])
@torch.no_grad()
def test_all_blocks_up_to_the_context_are_one_call(
    name: str, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    isa, counts, run = choice.choice().linears, list[int](), ffi.Kernels.run
    monkeypatch.setattr(choice, "choice", lambda: choice.Choice(isa, isa))
    monkeypatch.setattr(ffi.Kernels, "run", lambda self, steps: counts.append(len(steps)) or run(self, steps))
    fast = accelerate(quantized(name, "w8a8"), "cpu")
    images = fast(*inputs(fast))
    assert counts == calls
    monkeypatch.setattr(fast, "together", nullcontext)  # block by block
    assert torch.equal(fast(*inputs(fast)), images)


@pytest.mark.parametrize("name", ["repa", "jit"])
@torch.no_grad()
def test_they_compile_into_one_graph(name: str) -> None:
    fast = accelerate(quantized(name, "w8a8"))
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    example = inputs(fast)
    assert relative(compiled(*example), fast(*example)) < 1e-5


@pytest.mark.skipif("cpu" not in USABLE, reason="without a compiler there are no C kernels")
@torch.no_grad()
def test_threads_do_not_change_a_bit() -> None:
    fast = accelerate(quantized("jit", "w8a8"), "cpu")
    one, before = fast(*inputs(fast)), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(fast(*inputs(fast)), one)
    finally:
        torch.set_num_threads(before)
