"""One layer by every preset, and the order that the methods must keep."""

from dataclasses import replace

import pytest
import torch
from conftest import relative
from helpers import hard_inputs
from torch import nn

from svdit.checkpoints.store import load_model
from svdit.errors import UserError
from svdit.kernels import reference as ref
from svdit.kernels.formats import WEIGHT_FORMATS, Format
from svdit.quant.config import RECIPES, Recipe, dit_config, rank_ratio_config, recipe_for
from svdit.quant.linear import linears
from svdit.quant.lowrank import output_error, weighted_svd
from svdit.quant.observe import Statistics
from svdit.quant.solve import Solver, cholesky, quantize_linear
from svdit.quant.transforms import Transform


def run(linear: nn.Linear, recipe: Recipe, statistics: Statistics) -> tuple[nn.Module, float]:
    layer, report = quantize_linear("layer", linear, replace(recipe, rank=min(recipe.rank, 8)), statistics)
    assert report.sqnr is not None
    assert report.bytes_after == sum(v.nbytes for v in layer.state_dict().values())
    return layer, report.sqnr


@pytest.mark.parametrize("name", RECIPES)
def test_every_preset_runs_and_reports_the_error_it_makes(name: str, linear: nn.Linear, statistics: Statistics) -> None:
    layer, sqnr = run(linear, RECIPES[name], statistics)
    x = hard_inputs(500, seed=9)
    error = relative(layer(x), linear(x))
    floor = {8: 30.0, 4: 8.0}[RECIPES[name].weight.bits]
    assert floor < sqnr < 70
    assert 10 ** (-(sqnr + 2) / 20) < error < 10 ** (-(sqnr - 2) / 20)


def test_each_ingredient_earns_its_place(linear: nn.Linear, statistics: Statistics) -> None:
    w4a4 = RECIPES["svdquant-w4a4"]
    ladder = [
        replace(w4a4, low_rank="none", smoothing=0),
        replace(w4a4, low_rank="none"),
        w4a4,
        replace(w4a4, rounding="gptq"),
        RECIPES["w4a4"],
    ]
    sqnrs = [run(linear, recipe, statistics)[1] for recipe in ladder]
    assert sqnrs == sorted(sqnrs)
    assert sqnrs[-1] > sqnrs[-2] + 1


def test_full_precision_factors_of_full_rank_lose_nothing(linear: nn.Linear, statistics: Statistics) -> None:
    recipe = replace(RECIPES["w4a16"], factor_dtype="float32", rank=96, centre=True)
    layer, _ = quantize_linear("layer", linear, recipe, statistics)
    assert layer.spec.rank == 96
    assert 0 < relative(layer(hard_inputs(50)), linear(hard_inputs(50))) < 1e-5


def test_int8_factors_add_only_their_rounding_noise(linear: nn.Linear, statistics: Statistics) -> None:
    recipe = replace(RECIPES["w4a4"], rank=8, factors=Format(8))
    transform = Transform(statistics.mean, None, recipe.hadamard)
    solver = Solver(transform.weight(linear.weight.detach()), recipe, transform, statistics)
    error = solver.W - solver.decoded(*solver.rounded(solver.W))
    (U, V), (l1, l2) = weighted_svd(error, solver.R, 8), solver.refitted(error)
    # Rounding to n steps adds noise of variance step²/12 per element, step = absmax/127 of a row of U or V.
    steps = [factor.abs().amax(1) / 127 for factor in (U, V)]
    noise = float(steps[0].square().sum()) / 12 * output_error(V, solver.R)
    noise += float(steps[1].square().sum()) / 12 * float(solver.R.trace())  # L1 is orthonormal
    best = output_error(error - U @ V, solver.R)  # no factors of this rank have less
    assert best < output_error(error - l1 @ l2, solver.R) < best + 2 * noise
    assert noise < 0.01 * best


def test_whitening_helps_the_documented_mode(linear: nn.Linear, statistics: Statistics) -> None:
    plain, whitened = (
        quantize_linear("layer", linear, rank_ratio_config(0.5, 8, whiten).rules[0].recipe, statistics)[1].sqnr
        for whiten in (False, True)
    )
    assert whitened > plain + 3


def test_the_hadamard_block_shrinks_to_divide_the_width(statistics: Statistics) -> None:
    odd = Statistics.empty(48, torch.device("cpu"))
    odd.add(hard_inputs(1000)[:, :48], torch.Generator().manual_seed(0))
    layer, _ = quantize_linear("layer", nn.Linear(48, 32), RECIPES["w8a8"], odd)
    assert layer.spec.hadamard == 16


def test_a_zero_point_suits_the_weights_of_adaln() -> None:
    for name, layer in linears(load_model("digits")):
        if "adaLN" in name:
            W, forms = layer.weight.detach(), (WEIGHT_FORMATS["int4-zero"], WEIGHT_FORMATS["int4-bf16"])
            zero, signed = (relative(ref.fake_quantize(W, form), W) for form in forms)
            assert 0.88 * signed < zero < 0.96 * signed


def test_shifted_inputs_of_fc2_use_unsigned_codes() -> None:
    config = dit_config(RECIPES["svdquant-w4a4"])
    assert config.recipe("blocks.3.mlp.fc2").act.span == "unsigned"
    assert config.recipe("blocks.3.mlp.fc1").act.span == "symmetric"
    assert config.recipe("blocks.3.adaLN_modulation.1").act is None
    assert config.recipe("x_embedder.proj") is None
    assert dit_config(RECIPES["w4a4"]).recipe("blocks.3.mlp.fc2") == RECIPES["w4a4"]


@pytest.mark.parametrize(
    "bad",
    [
        {"low_rank": "factors"},
        {"weight": None},
        {"shift": -0.1},
        {"hadamard": 48},
        {"rank": -1},
    ],
)
def test_impossible_recipes_are_sentences(bad: dict[str, object]) -> None:
    with pytest.raises(UserError):
        Recipe(**bad)


def test_unknown_presets_name_the_known() -> None:
    with pytest.raises(UserError, match="'w2a2'; choose one of w8a8"):
        recipe_for("w2a2")
    assert recipe_for("w4a8", rank=4).rank == 4
    assert recipe_for("w4a8").weight == WEIGHT_FORMATS["int4"]


def test_moments_of_few_samples_still_have_a_factor() -> None:
    R = torch.eye(8, dtype=torch.float64)
    R[0, 1] = R[1, 0] = 1.0 + 1e-5  # indefinite until damped by more than 1e-5
    root = cholesky(R)
    assert 0 < float((root @ root.T - R).abs().max()) < 2e-4
