"""One layer by every preset, and the order that the methods must keep."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from conftest import relative
from helpers import hard_inputs
from torch import nn

from svdit.checkpoints.store import load_model
from svdit.kernels import reference as ref
from svdit.kernels.formats import WEIGHT_FORMATS, Format
from svdit.quant.config import CLOSED_SETS, RECIPES, Recipe, rank_ratio_config
from svdit.quant.linear import linears
from svdit.quant.lowrank import output_error, weighted_svd
from svdit.quant.observe import Statistics
from svdit.quant.solve import SPLITS, Problem, pose, quantize_linear, refit, rounded
from svdit.quant.transforms import Transform, candidates


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
    problem = pose(linear.weight.detach(), recipe, transform, statistics)
    error = problem.weight - ref.dequantize(*rounded(problem, problem.weight), problem.form)
    (U, V), (l1, l2) = weighted_svd(error, problem.moment, 8), refit(problem, error)
    # Rounding to n steps adds noise of variance step²/12 per element, step = absmax/127 of a row of U or V.
    steps = [factor.abs().amax(1) / 127 for factor in (U, V)]
    noise = float(steps[0].square().sum()) / 12 * output_error(V, problem.moment)
    noise += float(steps[1].square().sum()) / 12 * float(problem.moment.trace())  # L1 is orthonormal
    best = output_error(error - U @ V, problem.moment)  # no factors of this rank have less
    assert best < output_error(error - l1 @ l2, problem.moment) < best + 2 * noise
    assert noise < 0.01 * best


@pytest.mark.parametrize("name", ["w8a8", "w8a16", "w4a8", "w4a4"])
def test_a_refit_is_kept_where_it_helps_only(name: str, statistics: Statistics) -> None:
    """Weights whose first directions are large, as in trained models: with 8 bits rounding them to bf16 costs more."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(96, 8, generator=generator) @ torch.randn(8, 128, generator=generator) / 3
    linear = nn.Linear(128, 96)
    linear.weight = nn.Parameter(directions + torch.randn(96, 128, generator=generator) / 2)
    recipe = replace(RECIPES[name], rank=8)
    alternated, svd = (
        quantize_linear("layer", linear, replace(recipe, low_rank=low_rank), statistics)[0]
        for low_rank in ("alternated", "svd")
    )
    same = all(torch.equal(a, b) for a, b in zip(alternated.buffers(), svd.buffers(), strict=True))
    assert same == (recipe.weight.bits == 8)
    x = hard_inputs(500, seed=9)
    assert relative(alternated(x), linear(x)) <= relative(svd(x), linear(x)) * (1 if same else 0.99)


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


def test_moments_of_few_samples_still_have_a_factor() -> None:
    R = torch.eye(8, dtype=torch.float64)
    R[0, 1] = R[1, 0] = 1.0 + 1e-5  # indefinite until damped by more than 1e-5
    root = Problem(torch.zeros(9, 8), Recipe(), R).root
    assert 0 < float((root @ root.T - R).abs().max()) < 2e-4


@pytest.mark.parametrize("low_rank", SPLITS)
@pytest.mark.parametrize("rounding", CLOSED_SETS["rounding"])
def test_every_split_reports_the_error_of_what_it_stores(
    low_rank: str, rounding: str, linear: nn.Linear, statistics: Statistics
) -> None:
    changes = {"weight": None, "act": None} if low_rank == "factors" else {"act": None}
    recipe = replace(
        RECIPES["rtn"], low_rank=low_rank, rank=12, rounding=rounding, whiten=low_rank == "factors", **changes
    )
    layer, report = quantize_linear("layer", linear, recipe, statistics)
    x, W = statistics.holdout_rows, linear.weight.detach()
    power = (x @ W.T).square().sum() / (x @ (layer.effective_weight().detach() - W).T).square().sum()
    assert report.sqnr == pytest.approx(10 * float(power.log10()), abs=1e-2)  # bf16 factors of fp32 sums
    assert report.rank == layer.spec.rank == (0 if low_rank == "none" else 12)


def test_every_low_rank_is_solved_and_every_smoothing_has_its_grid() -> None:
    assert tuple(SPLITS) == CLOSED_SETS["low_rank"]
    grids = [choice for choice in CLOSED_SETS["smoothing"] if choice != "balanced"]
    assert [len(candidates(count)) for count in grids] == [1, 7, 19, 39]
    assert all(hasattr(torch, name) for name in CLOSED_SETS["factor_dtype"])


@pytest.mark.parametrize("factor_dtype", CLOSED_SETS["factor_dtype"])
def test_factors_are_stored_in_their_type(factor_dtype: str, linear: nn.Linear) -> None:
    recipe = replace(RECIPES["rtn"], low_rank="svd", rank=4, factor_dtype=factor_dtype)
    layer, _ = quantize_linear("layer", linear, recipe, None)
    assert layer.l1.dtype == layer.l2.dtype == getattr(torch, factor_dtype)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_constant_inputs_are_rounded_to_nearest(name: str, constant: float, linear: nn.Linear) -> None:
    """Nothing can be weighted by such inputs; the Cholesky factorization of zeros has no end."""
    still = Statistics.empty(128, torch.device("cpu"))
    still.add(torch.full((600, 128), constant), torch.Generator())
    recipe = replace(RECIPES[name], rank=8)
    _, report = quantize_linear("layer", linear, recipe, still)
    assert ("constant" in report.note) == (recipe.needs_inputs and (recipe.centre or not constant))
    assert 0 < report.weight_error < 0.3  # half a step of INT4 is 1/14 of absmax, which is below 4 RMS here
    json.dumps(asdict(report), allow_nan=False)


def test_zero_weights_have_no_error(statistics: Statistics) -> None:
    still = nn.Linear(128, 96)
    nn.init.zeros_(still.weight)
    layer, report = quantize_linear("layer", still, replace(RECIPES["w4a4"], rank=8), statistics)
    assert (report.weight_error, report.sqnr) == (0.0, None)
    assert torch.equal(layer(torch.randn(3, 128)), still.bias.detach().expand(3, -1))
    json.dumps(asdict(report), allow_nan=False)
