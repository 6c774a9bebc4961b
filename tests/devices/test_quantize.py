"""Quantizing on a GPU: every recipe runs there, and gives bit for bit what the CPU gives."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomize
from devices.fake_cuda import FakeCuda, state_of, value
from torch import nn

from svdit.kernels.formats import Format
from svdit.model.dit import DiT, DiTConfig
from svdit.quant.budget import plan_
from svdit.quant.config import RECIPES, QuantConfig, Recipe, Rule, dit_config, rank_ratio_config, recipe_for
from svdit.quant.linear import SVDLinear, quantized_layers
from svdit.quant.lowrank import truncated_svd, weighted_svd
from svdit.quant.quantize import quantize_
from svdit.sampling import calibration
from svdit.sampling.calibration import calibration_loop

LOOP = calibration_loop(images=4, steps=2)
SKIP = ("*.attn.*", "*.fc1", "final_layer*")  # every operation runs twice, in Python: fc2 and one adaLN are enough
FORMATS = {
    **{f"{bits} bits": Format(bits, 64, "bf16", "full") for bits in (5, 6)},
    **{f"{bits} bits": Format(bits, 64, "int8", "full") for bits in (2, 3)},
    "affine": Format(4, 64, "bf16", "affine"),
}


@pytest.fixture(autouse=True)
def few_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "CONDITIONS", 64)


@pytest.fixture
def small() -> DiT:
    """One block, 64 wide everywhere."""
    config = DiTConfig(4, 2, 4, hidden_size=64, depth=1, num_heads=2, mlp_ratio=1, num_classes=5)
    model = randomize(DiT(config))
    assert isinstance(model, DiT)
    return model


def same_on_both(model: nn.Module, quantize: Callable[[nn.Module], object]) -> None:
    """Quantize a copy on the CPU and the model on the fake GPU: the same tensors, bit for bit."""
    on_cpu = copy.deepcopy(model)
    quantize(on_cpu)
    with FakeCuda():
        quantize(model.to("cuda"))
        state = state_of(model)
    assert quantized_layers(model).keys() == quantized_layers(on_cpu).keys() != set()
    for name, tensor in on_cpu.state_dict().items():
        assert torch.equal(tensor.float(), state[name].float()), name


@pytest.mark.parametrize("preset", RECIPES)
def test_every_preset(small: DiT, preset: str) -> None:
    recipe = recipe_for(preset)
    smoothing = 7 if recipe.smoothing == 39 else recipe.smoothing  # fewer of the same operations
    recipe = replace(recipe, smoothing=smoothing, iterations=min(2, recipe.iterations))
    same_on_both(small, lambda model: quantize_(model, dit_config(recipe, skip=SKIP), LOOP))


@pytest.mark.parametrize("name", FORMATS)
def test_every_other_weight_format(small: DiT, name: str) -> None:
    recipe = Recipe(FORMATS[name], rank=4, smoothing=0, rounding="nearest", low_rank="svd")
    same_on_both(small, lambda model: quantize_(model, QuantConfig((Rule("blocks.0.attn.proj", recipe),)), LOOP))


@pytest.mark.parametrize("adaln", ["int4", "fp16"])
def test_other_adaln_and_quantized_factors(small: DiT, adaln: str) -> None:
    recipe = replace(RECIPES["rtn"], low_rank="svd", rank=8, factors=Format(8))
    same_on_both(small, lambda model: quantize_(model, dit_config(recipe, adaln, SKIP), LOOP))


@pytest.mark.parametrize("whiten", [False, True])
def test_the_rank_ratio_mode(small: DiT, whiten: bool) -> None:
    config = rank_ratio_config(0.5, 8, whiten)
    if whiten:  # of the layers that calibration reaches
        config = QuantConfig((*(Rule(name, None) for name in ("t_embedder*", "final_layer.linear")), *config.rules))
    same_on_both(small, lambda model: quantize_(model, config, LOOP if whiten else None))


def test_the_documented_class() -> None:
    """`SVDLinear.from_linear` and `quantize_parameters`."""
    linear = nn.Linear(16, 24)
    x = torch.randn(3, 16)
    expected = SVDLinear.from_linear(linear, 0.5).quantize_parameters(4)(x)
    with FakeCuda():
        layer = SVDLinear.from_linear(linear.to("cuda"), 0.5).quantize_parameters(4)
        state_of(layer)
        assert torch.equal(value(layer(x.to("cuda"))), expected.detach())
        assert layer.effective_weight().is_cuda


def test_a_resumed_run_is_on_the_device(small: DiT, tmp_path: Path) -> None:
    """Every layer comes from the work directory, where the CPU left it."""
    config = dit_config(RECIPES["rtn"], skip=SKIP)
    quantize_(copy.deepcopy(small), config, LOOP, work_dir=tmp_path)
    same_on_both(small, lambda model: quantize_(model, config, LOOP, work_dir=tmp_path))


def test_layers_are_kept_from_the_device(small: DiT, tmp_path: Path) -> None:
    config = dit_config(RECIPES["rtn"], skip=SKIP)
    on_cpu = copy.deepcopy(small)
    with FakeCuda():
        quantize_(small.to("cuda"), config, LOOP, work_dir=tmp_path)
        state = state_of(small)
    quantize_(on_cpu, config, LOOP, work_dir=tmp_path)
    for name, tensor in on_cpu.state_dict().items():
        assert torch.equal(tensor.float(), state[name].float()), name


def test_a_singular_second_moment() -> None:
    """Damping: fewer rows than features, and dead channels."""
    model, x = nn.Sequential(nn.Linear(64, 96)), torch.randn(8, 64)
    x[:, ::3] = 0
    recipes = [replace(RECIPES["w4a8"], smoothing=0, rank=4), replace(RECIPES["qera"], rank=4)]
    for recipe in recipes:
        config = QuantConfig((Rule("*", recipe),))
        same_on_both(copy.deepcopy(model), lambda m, c=config: quantize_(m, c, lambda n: n(x.to(n[0].bias.device))))


@pytest.mark.parametrize("shape", [(600, 520), (520, 600)])
def test_few_of_many_singular_values(shape: tuple[int, int]) -> None:
    """Above 512 rows a random start is drawn."""
    A, R = torch.randn(shape), torch.eye(shape[1], dtype=torch.float64)
    expected = [*truncated_svd(A, 4, sweeps=1), *weighted_svd(A, R, 4)]
    with FakeCuda():
        found = [*truncated_svd(A.to("cuda"), 4, sweeps=1), *weighted_svd(A.to("cuda"), R.to("cuda"), 4)]
        assert all(x.is_cuda for x in found)
    assert all(torch.equal(value(x), y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("target", [{"target_bytes": 250_000}, {"target_sqnr": 20.0}])
def test_bits_and_ranks_for_a_target(small: DiT, target: dict[str, float]) -> None:
    """Sensitivities and all."""
    config = dit_config(replace(RECIPES["w8a8"], smoothing=0), skip=SKIP)
    expected = plan_(copy.deepcopy(small), config, LOOP, **target)
    with FakeCuda(grad=True):
        plan = plan_(small.to("cuda"), config, LOOP, **target)
    assert (plan.config, plan.curve) == (expected.config, expected.curve)
