"""Calibration statistics against NumPy, and hooks that go away."""

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from conftest import relative
from helpers import hard_inputs
from torch import nn

from svdit.errors import UserError
from svdit.holdout import held_out
from svdit.quant.observe import BLOCK, GROUP, SAMPLE, TOKENS, Statistics, observe


def without(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of x (M, I) that are none of `rows`."""
    excluded = {tuple(row.tolist()) for row in rows}
    return torch.stack([row for row in x if tuple(row.tolist()) not in excluded])


def test_moments_equal_numpy(statistics: Statistics) -> None:
    observed = without(hard_inputs(4096), statistics.holdout_rows)
    assert len(observed) == statistics.count == 4096 - SAMPLE
    x = observed.double().numpy()
    shift = statistics.mean
    centred = x - shift.double().numpy()
    np.testing.assert_allclose(statistics.mean, x.mean(0), rtol=1e-5, atol=1e-5)
    for given, rows in ((None, x), (shift, centred)):
        expected = torch.from_numpy(rows.T @ rows / len(rows))
        assert relative(statistics.second_moment(given), expected) < 1e-6
        absmax = (observed - (0 if given is None else given)).abs().amax(0)
        assert torch.allclose(statistics.absmax(given), absmax, rtol=1e-5, atol=1e-5)


def test_wide_moments_are_kept_by_halves() -> None:
    x = torch.randn(50, 4 * BLOCK + 7, generator=torch.Generator().manual_seed(0))
    found = Statistics.empty(x.shape[1], x.device)
    found.add(x, torch.Generator())
    observed = without(x, found.holdout_rows).double()
    assert relative(found.second_moment(None), observed.T @ observed / found.count) < 1e-6
    kept = sum(block.nbytes for block in found.gram)
    assert kept < 0.7 * 8 * x.shape[1] ** 2
    assert kept + 4 * 2 * SAMPLE * x.shape[1] <= Statistics.nbytes(x.shape[1])


def test_the_sample_is_uniform_and_of_the_data(statistics: Statistics) -> None:
    x = hard_inputs(4096)
    rows = {tuple(row.tolist()): i for i, row in enumerate(x)}
    chosen = [rows[tuple(row.tolist())] for row in statistics.sample]
    assert len(set(chosen)) == SAMPLE
    assert abs(np.mean(chosen) / 4096 - 0.5) < 4 * (1 / 12 / SAMPLE) ** 0.5  # of a uniform mean, 4 standard errors
    assert len(without(statistics.sample, statistics.holdout_rows)) == SAMPLE


def collect(batches: Iterable[torch.Tensor], held_out: Iterable[torch.Tensor] = ()) -> Statistics:
    """Statistics of these batches."""
    batches, generator = list(batches), torch.Generator().manual_seed(0)
    gathered = Statistics.empty(batches[0].shape[-1], torch.device("cpu"))
    for x in batches:
        gathered.add(x, generator)
    for x in held_out:
        gathered.add(x, generator, held_out=True)
    return gathered


@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_held_out_examples_are_whole_bounded_and_the_same_for_every_batch_size(tokens: int) -> None:
    x = torch.randn(400, tokens, 8, generator=torch.Generator().manual_seed(0))
    whole = collect([x])
    for size in (1, 3, 64):
        parts = collect(x.split(size))
        assert torch.equal(parts.holdout_rows, whole.holdout_rows) and torch.equal(parts.sample, whole.sample)
        rounding = 2**-24 * (400 * tokens) ** 0.5  # of a sum of so many products, in each of the two
        assert relative(parts.second_moment(None), whole.second_moment(None)) < 2 * rounding
    assert len(whole.holdout_rows) == min(50 * min(tokens, TOKENS), SAMPLE)
    number = {tuple(row.tolist()): i for i, rows in enumerate(x) for row in rows}
    out = {number[tuple(row.tolist())] for row in whole.holdout_rows}
    assert out.isdisjoint(number[tuple(row.tolist())] for row in whole.sample)
    assert len(out) == len(whole.holdout_rows) / min(tokens, TOKENS) and max(out) > 200
    if tokens <= TOKENS:  # those that leave again join the others
        assert whole.count + len(whole.holdout_rows) == 400 * tokens


def test_held_out_rows_are_in_no_statistic() -> None:
    x = torch.randn(40, 6, 8, generator=torch.Generator().manual_seed(0))
    before = collect([x])
    out = [i for i in range(40) if (before.holdout_rows == x[i, 0]).all(1).any()]
    assert len(out) == 40 // GROUP
    x[out] = 1e6
    after = collect([x])
    assert after.holdout_rows.min() == 1e6
    for name in ("count", "total", "minimum", "maximum", "sample", "mean"):
        assert torch.equal(*(torch.as_tensor(getattr(each, name)) for each in (before, after))), name
    assert torch.equal(before.second_moment(None), after.second_moment(None))


@pytest.mark.parametrize("rows", [16, 256])
def test_few_rows_shrink_covariances_towards_zero(rows: int) -> None:
    true = hard_inputs(1 << 17, seed=5).double()
    mean = true.mean(0)
    truth = (true - mean).T @ (true - mean) / len(true)
    found = Statistics.empty(128, torch.device("cpu"))
    found._include(hard_inputs(rows, seed=6), torch.rand(rows))
    sample, shrunk = found.second_moment(found.mean), found.expected_moment(found.mean)
    assert torch.allclose(shrunk.diagonal(), sample.diagonal(), rtol=1e-5)
    weight = float(1 - shrunk[0, 1] / sample[0, 1])
    variances = truth.diagonal()
    off = truth.square().sum() - variances.square().sum()
    best = float((variances.sum() ** 2 - variances.square().sum() + off) / off / rows)
    assert weight == pytest.approx(min(best, 1), rel=0.5)
    assert relative(shrunk, truth) < 0.99 * relative(sample, truth)
    found._include(hard_inputs(256, seed=7), torch.rand(256))  # 4 rows per feature
    assert torch.equal(found.expected_moment(None), found.second_moment(None)) == (rows == 256)


def test_independent_inputs_have_a_diagonal_moment_and_one_row_its_square() -> None:
    found = Statistics.empty(64, torch.device("cpu"))
    found._include(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)), torch.rand(16))
    shrunk, mean = found.expected_moment(found.mean), found.total / found.count
    assert relative(shrunk, shrunk.diagonal().diag()) < 0.1
    assert relative(found.expected_moment(None), shrunk + mean.outer(mean)) < 1e-12
    row = torch.randn(1, 64)
    one = Statistics.empty(64, torch.device("cpu"))
    one._include(row, torch.rand(1))
    assert relative(one.expected_moment(None), row.T.double() @ row.double()) < 1e-6


def test_of_few_examples_none_is_held_out() -> None:
    few = collect([torch.randn(GROUP - 1, 16, 8)])
    assert (few.count, len(few.holdout_rows)) == (16 * (GROUP - 1), 0)
    assert len(collect([torch.randn(GROUP, 16, 8)]).holdout_rows) == 16


def test_what_the_loop_holds_out_replaces_the_automatic_choice() -> None:
    model, x, other = nn.Sequential(nn.Linear(8, 8)), torch.randn(80, 8), torch.randn(5, 8)

    def loop(model: nn.Module) -> None:
        with held_out():
            model(other[:2])
        model(x)
        with held_out():
            model(other[2:])

    found = observe(model, ["0"], loop)["0"]
    assert found.count == 80
    assert sorted(found.holdout_rows.tolist()) == sorted(other.tolist())
    late = collect([x], [other])
    assert late.count == 80 and relative(late.second_moment(None), x.T.double() @ x.double() / 80) < 1e-6

    def all_held_out(model: nn.Module) -> None:
        with held_out():
            model(x)

    with pytest.raises(UserError, match="never reached 0"):
        observe(model, ["0"], all_held_out)


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
