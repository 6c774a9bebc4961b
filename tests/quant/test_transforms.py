"""Smoothing, centring and rotation are exact before any rounding."""

from dataclasses import replace

import pytest
import torch
from helpers import hard_inputs
from torch import nn

from svdit.quant.config import RECIPES, LowRank
from svdit.quant.observe import Statistics
from svdit.quant.solve import quantize_linear
from svdit.quant.transforms import (
    LIMITS,
    Transform,
    balanced_scale,
    candidates,
    choose_transform,
    smoothing_scale,
)

X = hard_inputs(50).double()
MEAN, SCALE = X.mean(0), torch.logspace(-2, 2, 128, dtype=torch.float64)


@pytest.mark.parametrize("shift", [None, MEAN])
@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("hadamard", [0, 64])
def test_transforms_are_exact(shift: torch.Tensor | None, scale: torch.Tensor | None, hadamard: int) -> None:
    W = torch.randn(20, 128, dtype=torch.float64)
    transform = Transform(shift, scale, hadamard)
    y = transform.inputs(X) @ transform.weight(W).T + (0 if shift is None else W @ shift)
    expected = X @ W.T
    assert float((y - expected).abs().max() / expected.abs().max()) < 1e-12


@pytest.mark.parametrize("hadamard", [0, 64])
def test_second_moment_follows_by_congruence(statistics: Statistics, hadamard: int) -> None:
    transform = Transform(statistics.mean, SCALE.float(), hadamard)
    T = transform.inputs(torch.eye(128) + statistics.mean).double()  # row by row what a unit vector becomes
    expected = T.T @ statistics.expected_moment(statistics.mean) @ T
    assert float((transform.second_moment(statistics) - expected).norm() / expected.norm()) < 1e-5


def test_the_grid_is_the_published_one() -> None:
    assert candidates(0) == [(0.0, 0.0)]
    assert len(candidates(39)) == 39
    assert candidates(39)[:2] == [(0.0, 0.0), (0.05, 0.0)]
    assert (0.5, 0.5) in candidates(39)
    assert len(candidates(19)) == 19
    assert candidates(7)[1:4] == [(0.25, 0.0), (0.5, 0.0), (0.75, 0.0)]
    assert set(candidates(19)) <= {(round(a, 2), round(b, 2)) for a, b in candidates(39)} | set(candidates(39))


def test_scales_of_dead_channels_are_the_least_and_all_within_limits() -> None:
    largest = torch.tensor([0.0, 1e-30, 1e30, 4.0])
    W = torch.ones(2, 4)
    scale = smoothing_scale(largest, W, 0.5, 0.5)
    assert scale.tolist() == pytest.approx([LIMITS[0], *LIMITS, 2.0])
    assert smoothing_scale(torch.ones(1), torch.zeros(2, 1), 0.5, 0.5).tolist() == [1.0]


def test_smoothing_is_found_where_it_helps(linear: nn.Linear, statistics: Statistics) -> None:
    recipe = replace(RECIPES["w4a4"], hadamard=0, rank=8, smoothing=19)
    transform, (alpha, _) = choose_transform(linear.weight.detach(), statistics, recipe)
    assert alpha > 0.2
    assert transform.scale is not None
    assert transform.scale[3] > 3 * transform.scale.median()


@pytest.mark.parametrize("low_rank", ["none", "alternated"])
def test_balanced_scales_have_the_least_product_of_mean_squares(
    low_rank: LowRank, linear: nn.Linear, statistics: Statistics
) -> None:
    """Of the mean squares of x̂ and of r̂ over any set of columns, by Cauchy and Schwarz: (Σ rms(x) ‖r‖)²."""
    W, mean_square = linear.weight.detach(), statistics.mean_square(statistics.mean)
    r = W.double()
    if low_rank == "alternated":
        U, S, V = torch.linalg.svd(r, full_matrices=False)
        r = r - (U[:, :8] * S[:8]) @ V[:8]
    scale = balanced_scale(W, mean_square, replace(RECIPES["w4a4"], rank=8, low_rank=low_rank)).double()
    x, columns = mean_square.double(), r.square().sum(0)
    for part in (slice(0, 64), slice(64, 128), slice(3, 9)):
        product = (x / scale**2)[part].sum() * (columns * scale**2)[part].sum()
        least = (x[part] * columns[part]).sqrt().sum() ** 2
        assert float(product) == pytest.approx(float(least), rel=1e-3)  # the branch is that of two sweeps


def test_the_mean_square_is_the_diagonal_of_the_second_moment(statistics: Statistics) -> None:
    for shift in (None, statistics.mean, torch.full((128,), 0.3)):
        expected = statistics.second_moment(shift).diagonal().float()
        torch.testing.assert_close(statistics.mean_square(shift), expected)


@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w4a4"])
@torch.no_grad()
def test_balanced_smoothing_reduces_the_error_of_hard_inputs(
    preset: str, linear: nn.Linear, statistics: Statistics
) -> None:
    recipe, errors = replace(RECIPES[preset], rank=8, hadamard=0), list[float]()
    for smoothing in ("balanced", 0):
        layer, _ = quantize_linear("layer", linear, replace(recipe, smoothing=smoothing), statistics)
        x = statistics.holdout_rows
        errors.append(float((layer(x) - linear(x)).square().sum()))
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("unit", [1.0, 0.01, 100.0])
def test_scales_follow_the_unit_of_the_inputs_with_dead_channels_too(unit: float) -> None:
    """One that does not would set the step of its row or group alone."""
    generator = torch.Generator().manual_seed(0)
    W, mean_square = torch.randn(20, 8, generator=generator), torch.rand(8, generator=generator) + 0.1
    W[:, 2], mean_square[5] = 0, 0
    scale = balanced_scale(W / unit, mean_square * unit**2, RECIPES["rtn"]) / unit
    torch.testing.assert_close(scale, balanced_scale(W, mean_square, RECIPES["rtn"]))
    assert scale[2] == scale.max() and scale[5] == scale.min() and len(scale.unique()) == 6
