"""Calibration statistics against NumPy, and hooks that go away."""

import numpy as np
import pytest
import torch
from conftest import relative
from helpers import hard_inputs
from torch import nn

from svdit.errors import UserError
from svdit.quant.observe import BLOCK, SAMPLE, Statistics, observe


def test_moments_equal_numpy(statistics: Statistics) -> None:
    x = hard_inputs(4096).double().numpy()
    shift = statistics.mean
    centred = x - shift.double().numpy()
    np.testing.assert_allclose(statistics.mean, x.mean(0), rtol=1e-5, atol=1e-5)
    for given, rows in ((None, x), (shift, centred)):
        expected = torch.from_numpy(rows.T @ rows / len(rows))
        assert relative(statistics.second_moment(given), expected) < 1e-6
        absmax = (hard_inputs(4096) - (0 if given is None else given)).abs().amax(0)
        assert torch.allclose(statistics.absmax(given), absmax, rtol=1e-5, atol=1e-5)


def test_wide_moments_are_kept_by_halves() -> None:
    x = torch.randn(50, 4 * BLOCK + 7, generator=torch.Generator().manual_seed(0))
    found = Statistics.empty(x.shape[1], x.device)
    found.add(x, torch.Generator())
    assert relative(found.second_moment(None), x.double().T @ x.double() / 50) < 1e-6
    kept = sum(block.nbytes for block in found.gram)
    assert kept < 0.7 * 8 * x.shape[1] ** 2
    assert kept + 4 * SAMPLE * x.shape[1] <= Statistics.nbytes(x.shape[1])


def test_the_sample_is_uniform_and_of_the_data(statistics: Statistics) -> None:
    x = hard_inputs(4096)
    rows = {tuple(row.tolist()): i for i, row in enumerate(x)}
    chosen = [rows[tuple(row.tolist())] for row in statistics.sample]
    assert len(set(chosen)) == SAMPLE
    assert abs(np.mean(chosen) / 4096 - 0.5) < 0.03
    both = {tuple(r.tolist()) for r in statistics.selection_rows} & {tuple(r.tolist()) for r in statistics.holdout_rows}
    assert not both


def test_a_sample_does_not_depend_on_which_layers_are_observed_with_it() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(64, 8)
    both = observe(model, ["0", "1"], lambda m: m(x))
    alone = observe(model, ["1"], lambda m: m(x))
    assert torch.equal(both["1"].sample, alone["1"].sample)
    assert torch.equal(both["1"].second_moment(None), alone["1"].second_moment(None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_names_the_layer_and_hooks_are_gone(bad: float) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].bias[2] = bad
    with pytest.raises(UserError, match="input of 1 contains NaN or Inf"):
        observe(model, ["0", "1"], lambda m: m(torch.ones(2, 8)))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_is_never_reached_is_a_sentence() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(UserError, match="never reached 1"):
        observe(model, ["0", "1"], lambda m: m[0](torch.ones(2, 8)))
