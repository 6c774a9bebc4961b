"""SVDLinear: what it stores, what it computes, what it weighs."""

from dataclasses import asdict, replace

import pytest
import torch
from conftest import relative
from torch import nn

from svdit.compat import apply_svd_to_dit
from svdit.errors import UserError
from svdit.kernels.formats import ACT_FORMATS, WEIGHT_FORMATS, Format
from svdit.model.dit import DiT
from svdit.model.zoo import DiT_models
from svdit.quant.config import RECIPES, QuantConfig, Recipe, Rule, dit_config, recipe_for
from svdit.quant.linear import (
    LinearSpec,
    SVDLinear,
    layer_specs,
    linears,
    quantized_layers,
    rank_for_ratio,
    rebuild_,
)
from svdit.quant.quantize import quantize_
from svdit.quant.solve import fit


def seeded_linear(o: int = 48, i: int = 64, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(i, o, bias)


@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_float_factors_equal_the_linear(bias: bool) -> None:
    linear, x = seeded_linear(bias=bias), torch.randn(3, 5, 64)
    layer = SVDLinear.from_linear(linear, 1.0)
    assert layer.spec.rank == 48
    assert 0 < relative(layer(x), linear(x)) < 1e-6


def test_truncation_error_is_the_tail_of_the_spectrum() -> None:
    linear = seeded_linear()
    layer = SVDLinear.from_linear(linear, 0.5)
    S = torch.linalg.svdvals(linear.weight.detach().double())
    error = (layer.effective_weight() - linear.weight).norm()
    assert error.item() == pytest.approx(float(S[24:].square().sum().sqrt()), rel=1e-5)


@pytest.mark.parametrize(("ratio", "rank"), [(0.95, 46), (0.5, 24), (0.001, 1), (1.0, 48)])
def test_rank_for_ratio(ratio: float, rank: int) -> None:
    assert rank_for_ratio(ratio, 64, 48) == rank
    assert SVDLinear(64, 48, rank_ratio=ratio).spec.rank == rank


@pytest.mark.parametrize("ratio", [0, -1, 1.5])
def test_impossible_ratios_are_sentences(ratio: float) -> None:
    with pytest.raises(UserError, match=f"rank ratio of {ratio}"):
        rank_for_ratio(ratio, 8, 8)


@pytest.mark.parametrize("bits", range(2, 9))
def test_quantized_factors_are_really_used(bits: int) -> None:
    linear, x = seeded_linear(), torch.randn(7, 64)
    layer = SVDLinear.from_linear(linear, 0.9)
    before = layer(x)
    layer.quantize_parameters(bits)
    after = layer(x)
    assert 0 < relative(after, before) < 3 * 2.0 ** (1 - bits)
    layer.l1_codes[0, 0] ^= 1  # change one code, see the output change
    assert not torch.equal(layer(x)[:, 0], after[:, 0])
    assert torch.equal(layer(x)[:, 1:], after[:, 1:])


def test_quantizing_factors_twice_is_an_error() -> None:
    layer = SVDLinear.from_linear(seeded_linear(), 0.9).quantize_parameters()
    with pytest.raises(UserError, match="already quantized"):
        layer.quantize_parameters()


def test_documented_call_replaces_every_linear_and_keeps_no_weight(tiny: DiT) -> None:
    names = [name for name, _ in linears(tiny)]
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([3, 700]), torch.tensor([0, 5])
    before, size = tiny(x, t, y), sum(v.nbytes for v in tiny.state_dict().values())
    assert apply_svd_to_dit(tiny, 0.5) is tiny
    assert list(quantized_layers(tiny)) == names
    assert not list(linears(tiny))
    for layer in quantized_layers(tiny).values():
        layer.quantize_parameters(8)
    state = tiny.state_dict()
    assert not any(key.removesuffix(".weight") in names for key in state)
    assert sum(v.nbytes for v in state.values()) < size / 2
    assert relative(tiny(x, t, y), before) > 0.01


SPECS = {
    "rank ratio": LinearSpec(rank=20, factors=Format(8), rank_ratio=0.4),
    "three bits": LinearSpec(rank=20, factors=Format(3)),
    "weight only": LinearSpec(rank=4, weight=WEIGHT_FORMATS["int4"], factor_dtype="bfloat16"),
    "plain": LinearSpec(weight=WEIGHT_FORMATS["int8"], act=ACT_FORMATS["int8"]),
    **{
        f"{w} {a}": LinearSpec(8, Format(8), "float32", WEIGHT_FORMATS[w], ACT_FORMATS[a], True, True, 64)
        for w, a in (("int4", "int4"), ("int4-bf16", "int8"), ("fp8", "fp8"), ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"))
    },
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_weighs_what_its_spec_says(spec: LinearSpec, bias: bool) -> None:
    layer = SVDLinear(128, 96, bias, spec=spec)
    assert sum(v.nbytes for v in layer.state_dict().values()) == spec.nbytes(96, 128, bias)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_specs_survive_json_and_rebuild_an_equal_layer(spec: LinearSpec) -> None:
    model = nn.Sequential(SVDLinear(128, 96, spec=spec))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dtype in (torch.float32, torch.bfloat16):
                tensor.uniform_(0.5, 1.5)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(128, 96))
    rebuild_(empty, layer_specs(model))
    assert empty[0].spec == spec
    assert all(v.is_meta for v in empty.state_dict().values())
    empty.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(4, 128)
    assert torch.equal(empty(x), model(x))
    assert model(x).abs().max() > 0


def test_every_part_of_the_formula_is_there() -> None:
    spec = LinearSpec(4, None, "float32", WEIGHT_FORMATS["int8"], None, True, True, 64)
    layer = SVDLinear(64, 32, spec=spec)
    with torch.no_grad():
        for tensor in (layer.in_scale, layer.in_shift, layer.bias, layer.residual_scales):
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
        layer.residual_codes.copy_(torch.randint(-127, 128, (32, 64)))
    x = torch.randn(5, 64)
    expected = (x - layer.in_shift) @ layer.effective_weight().T + layer.bias
    assert 0 < relative(layer(x), expected) < 1e-5


def test_permuting_tokens_permutes_outputs_and_neighbours_do_not_matter() -> None:
    spec = LinearSpec(weight=WEIGHT_FORMATS["int8"], act=ACT_FORMATS["int8"])
    layer = SVDLinear(64, 32, spec=spec)
    layer.residual_codes.copy_(torch.randint(-127, 128, (32, 64)))
    x, order = torch.randn(2, 9, 64), torch.randperm(9)
    # Rows are rounded alike; products of 64 terms differ by the order of their sum, at most 64 · 2⁻²⁴ of Σ|terms|.
    bound = 64 * 2.0**-24 * (x.abs() @ layer.effective_weight().detach().abs().T).amax()
    assert (layer(x[:, order]) - layer(x)[:, order]).abs().max() <= bound
    x[1] *= 100
    assert (layer(x)[:1] - layer(x[:1])).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_it_passes_for_a_linear_of_the_models_type(dtype: torch.dtype) -> None:
    linear = seeded_linear().to(dtype)
    model = nn.Sequential(linear)
    config = QuantConfig((Rule("*", recipe_for("w8a8", rank=4)),))
    x = torch.randn(64, 9, 64, dtype=dtype)
    quantize_(model, config, lambda m: m(x))
    layer = model[0]
    for name in ("in_features", "out_features"):
        assert getattr(layer, name) == getattr(linear, name)
    for part in ("weight", "bias"):
        assert getattr(layer, part).shape == getattr(linear, part).shape
        assert getattr(layer, part).device == getattr(linear, part).device
    assert layer.weight.dtype == layer(x).dtype == dtype
    assert 0 < relative(layer.weight.double(), linear.weight.double()) < 0.02
    assert model.to(torch.float16)[0].weight.dtype == torch.float16
    assert model.to("meta")[0].weight.device.type == "meta"
    rebuilt = nn.Sequential(seeded_linear().to(dtype))
    rebuild_(rebuilt, layer_specs(model))
    assert rebuilt[0].weight.dtype == dtype
    buffers = sum(tensor.nbytes for tensor in layer.buffers())
    assert buffers + sum(p.nbytes for p in layer.parameters()) == layer.layer().nbytes


def test_zero_input_gives_exactly_the_bias() -> None:
    spec = LinearSpec(4, None, "float32", WEIGHT_FORMATS["int8"], ACT_FORMATS["int4"])
    layer = SVDLinear(64, 32, spec=spec)
    with torch.no_grad():
        layer.bias.uniform_()
    assert torch.equal(layer(torch.zeros(3, 64)), layer.bias.expand(3, -1))


def test_rebuilding_over_something_else_is_a_sentence() -> None:
    with pytest.raises(UserError, match="0 is a ReLU, not a Linear"):
        rebuild_(nn.Sequential(nn.ReLU()), {"0": {"rank": 1}})


@pytest.mark.parametrize(
    ("recipe", "adaln", "megabytes"),
    [(RECIPES["w8a8"], "int8", 707), (replace(RECIPES["w8a8"], rank=0), "int8", 690), (RECIPES["w4a8"], "int4", 404)],
)
def test_the_published_model_weighs_what_the_docs_say(recipe: Recipe, adaln: str, megabytes: float) -> None:
    config = dit_config(recipe, adaln)
    with torch.device("meta"):
        model = DiT_models["DiT-XL/2"]()
        for name, linear in list(linears(model)):
            if found := config.recipe(name):
                found = fit(found, linear.weight)
                scaled, shifted = bool(found.smoothing), found.centre
                spec = LinearSpec(found.rank, None, found.factor_dtype, found.weight, found.act, scaled, shifted)
                rebuild_(model, {name: asdict(spec)})
    total = sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e6
    assert megabytes - 1.5 < total < megabytes
