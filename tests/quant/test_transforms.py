"""Smoothing, centring and rotation are exact before any rounding."""

from dataclasses import replace

import pytest
import torch
from helpers import hard_inputs
from torch import nn

from svdit.quant.config import RECIPES
from svdit.quant.observe import Statistics
from svdit.quant.transforms import LIMITS, Transform, candidates, choose_transform, smoothing_scale

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


def test_scales_of_dead_channels_are_one_and_all_within_limits() -> None:
    largest = torch.tensor([0.0, 1e-30, 1e30, 4.0])
    W = torch.ones(2, 4)
    scale = smoothing_scale(largest, W, 0.5, 0.5)
    assert scale.tolist() == pytest.approx([1.0, *LIMITS, 2.0])
    assert smoothing_scale(torch.ones(1), torch.zeros(2, 1), 0.5, 0.5).tolist() == [1.0]


def test_smoothing_is_found_where_it_helps(linear: nn.Linear, statistics: Statistics) -> None:
    recipe = replace(RECIPES["w4a4"], hadamard=0, rank=8)
    transform, (alpha, _) = choose_transform(linear.weight.detach(), statistics, recipe)
    assert alpha > 0.2
    assert transform.scale is not None
    assert transform.scale[3] > 3 * transform.scale.median()
