"""Folding smoothing and centring: exact with real attention, whatever the formats; and back again."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import relative
from layers import model_bound
from torch import Tensor

from svdit.checkpoints.fuse import foldable, fuse_, unfuse_
from svdit.checkpoints.store import load_model, read_header, save_model
from svdit.errors import UserError
from svdit.kernels import ops
from svdit.kernels import reference as ref
from svdit.model.dit import DiT
from svdit.quant.config import ADALN, QuantConfig, Recipe, Rule, dit_config, recipe_for
from svdit.quant.linear import SVDLinear, linears, quantized_layers, swap
from svdit.quant.quantize import quantize_
from svdit.quant.recipe import Solver, assemble, fit
from svdit.quant.transforms import Transform
from svdit.runtime.accelerate import accelerate

X = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(1))
T, Y = torch.tensor([3, 500, 3, 900]), torch.tensor([1, 1, 5, 0])


def planted(model: DiT, recipe: Recipe, *, scaled: bool = True, shifted: bool = True, skip: str = "") -> DiT:
    """Every linear of the blocks quantized under λ from 1/20 to 20 and a μ of its own; adaLN without them."""
    generator = torch.Generator().manual_seed(0)
    for name, linear in list(linears(model.blocks)):
        if skip and skip in name:
            continue
        chosen, I = (ADALN["int4"] if "adaLN" in name else recipe), linear.in_features
        assert chosen is not None
        transform = Transform(None, None, chosen.hadamard)
        if "adaLN" not in name:
            scale = torch.exp((2 * torch.rand(I, generator=generator) - 1) * 3)
            transform.scale = scale if scaled else None
            transform.shift = torch.randn(I, generator=generator) if shifted else None
        plain = fit(replace(chosen, rounding="nearest", search_scales=False, low_rank="svd"), linear.weight)
        solver = Solver(transform.weight(linear.weight.detach()), plain, transform, None)
        swap(model.blocks, name, assemble(linear, plain, transform, solver.split()))
    return model


def calibrated(model: DiT, preset: str, adaln: str = "int8", skip: tuple[str, ...] = ()) -> DiT:
    quantize_(model, dit_config(recipe_for(preset, rank=4, iterations=2), adaln, skip), lambda model: model(X, T, Y))
    return model


def exactly(self: SVDLinear, x: Tensor) -> Tensor:
    """SVDLinear.forward in float64, activations left as they are."""
    hat = x if self.in_shift is None else x - self.in_shift
    hat = ref.rotate(hat if self.in_scale is None else hat / self.in_scale, self.spec.hadamard)
    l1, l2 = self.low_rank()
    y = hat @ (self.residual().double() + l1.double() @ l2.double()).T
    return (y if self.out_scale is None else y * self.out_scale) + self.bias


@pytest.mark.parametrize("hadamard", [0, 64])
@pytest.mark.parametrize(("scaled", "shifted"), [(True, False), (False, True), (True, True)])
def test_a_block_and_the_whole_model_are_equal_in_float64(
    tiny: DiT, hadamard: int, scaled: bool, shifted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SVDLinear, "forward", exactly)
    recipe = recipe_for("w8a16", rank=4, hadamard=hadamard)
    model = planted(tiny, recipe, scaled=scaled, shifted=shifted).double()
    fused = deepcopy(model)
    fuse_(fused)
    generator = torch.Generator().manual_seed(2)
    tokens, c = (torch.randn(*shape, 64, generator=generator).double() for shape in ((3, 7), (3,)))
    with torch.no_grad():
        for one, other in zip(model.blocks, fused.blocks, strict=True):
            assert 0 < relative(other(tokens, c), one(tokens, c)) < 1e-12
        assert 0 < relative(fused(X.double(), T, Y), model(X.double(), T, Y)) < 1e-12


@pytest.mark.parametrize("adaln", ["int8", "int4", "fp16"])
def test_calibrated_models_are_equal_in_float32_and_lose_what_was_folded(tiny: DiT, adaln: str) -> None:
    model = calibrated(tiny, "w4a16", adaln)
    before = deepcopy(model)
    assert foldable(model) and not model.config.absorbed
    fuse_(model)
    assert not foldable(model) and model.config.absorbed
    with torch.no_grad():
        assert 0 < relative(model(X, T, Y), before(X, T, Y)) < 1e-5
    for name, layer in quantized_layers(model).items():
        kept = name.endswith("fc2")
        assert (layer.in_scale is not None, layer.in_shift is not None) == (kept, kept)
        assert (layer.spec.scaled, layer.spec.shifted) == (kept, kept)
        rows = name.endswith("qkv") or (name.startswith("blocks") and "adaLN" in name)
        assert (layer.out_scale is not None) == layer.spec.out_scaled == rows
        was = before.get_submodule(name).state_dict()
        for key in was.keys() & layer.state_dict().keys() - {"bias"}:  # nothing that is stored was rounded again
            assert torch.equal(was[key], layer.state_dict()[key]), (name, key)


@pytest.mark.parametrize("preset", ["w8a8", "w4a4", "svdquant"])
def test_rounded_activations_stay_within_what_a_code_at_the_edge_costs(tiny: DiT, preset: str) -> None:
    source = deepcopy(tiny)
    model = calibrated(tiny, preset)
    fused = deepcopy(model)
    fuse_(fused)
    with torch.no_grad():
        cost = relative(model(X, T, Y), source(X, T, Y))
        assert 0 < relative(fused(X, T, Y), model(X, T, Y)) < 0.1 * cost


@pytest.mark.parametrize("skip", ["attn.qkv", "attn.proj", "mlp.fc1", "adaLN"])
def test_layers_left_alone_are_no_trouble(tiny: DiT, skip: str) -> None:
    source, model = deepcopy(tiny), planted(tiny, recipe_for("w8a16", rank=4), skip=skip)
    fused = deepcopy(model)
    fuse_(fused)
    back = deepcopy(fused)
    unfuse_(back, source)
    with torch.no_grad():
        expected = model(X, T, Y)
        assert 0 < relative(fused(X, T, Y), expected) < 1e-4
        assert 0 < relative(back(X, T, Y), expected) < 1e-4
    for key, tensor in source.state_dict().items():
        if skip in key:
            assert torch.equal(back.state_dict()[key], tensor)


@pytest.mark.parametrize("adaln", ["int8", "int4", "fp16"])
def test_unfusing_gives_back_every_number(tiny: DiT, adaln: str) -> None:
    source, model = deepcopy(tiny), calibrated(tiny, "w4a8", adaln)
    back = deepcopy(model)
    fuse_(back)
    unfuse_(back, source)
    assert not back.config.absorbed
    for name, layer in quantized_layers(model).items():
        again = back.get_submodule(name)
        assert isinstance(again, SVDLinear)
        torch.testing.assert_close(again.effective_weight(), layer.effective_weight(), rtol=1e-5, atol=1e-7)
        for key, tensor in layer.state_dict().items():
            torch.testing.assert_close(again.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)


def test_a_fused_file_loads_as_it_is_and_says_so(tiny: DiT, tmp_path: Path) -> None:
    model = calibrated(tiny, "w4a8")
    save_model(model, tmp_path / "plain.safetensors")
    fuse_(model)
    save_model(model, tmp_path / "fused.safetensors")
    header = read_header(tmp_path / "fused.safetensors")
    assert header is not None and header["config"]["absorbed"] is True
    loaded = load_model(tmp_path / "fused.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(X, T, Y), model(X, T, Y))
    with pytest.raises(UserError, match="folded already"):
        fuse_(loaded)
    plain = read_header(tmp_path / "plain.safetensors")
    assert plain is not None and plain["config"]["absorbed"] is False


def test_a_float_model_has_nothing_to_fold(tiny: DiT) -> None:
    assert not foldable(tiny)
    with pytest.raises(UserError, match="not quantized"):
        fuse_(tiny)


@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w4a4", "w4a16"])
def test_accelerated_fused_models_compute_the_same(tiny: DiT, preset: str) -> None:
    model = calibrated(tiny, preset, "int4" if preset == "w4a8" else "int8")
    fuse_(model)
    with torch.no_grad():
        expected = model(X, T, Y)
    for backend in (name for name, reason in ops.reasons().items() if not reason):
        bound = model_bound(backend, 4 if preset == "w4a4" else 8)
        assert relative(accelerate(deepcopy(model), backend)(X, T, Y), expected) < bound, backend


def test_every_linear_quantized_alike_also_folds_and_runs(tiny: DiT) -> None:
    recipe = recipe_for("w8a8", rank=4, low_rank="svd")
    quantize_(tiny, QuantConfig((Rule("blocks.*", recipe),)), lambda model: model(X, T, Y))
    before = deepcopy(tiny)
    fuse_(tiny)
    with torch.no_grad():
        expected = before(X, T, Y)
        assert 0 < relative(tiny(X, T, Y), expected) < 1e-3
    assert relative(accelerate(tiny)(X, T, Y), expected) < model_bound(ops.choose())


def test_absorbing_the_one_is_what_keeps_bfloat16_exact() -> None:
    scale = 0.3 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    wanted = (1 + scale) / 50
    kept = 1 + (wanted - 1).bfloat16().float()
    absorbed = wanted.bfloat16().float()
    assert relative(kept, wanted) == pytest.approx(0.054, rel=0.02)
    assert relative(absorbed, wanted) == pytest.approx(0.0016, rel=0.1)
