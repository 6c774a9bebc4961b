"""The jackknife against theory and Monte Carlo."""

import numpy as np
import pytest
import torch

from svdit.evaluation.features import Features
from svdit.evaluation.frechet import jackknifed_distance
from svdit.evaluation.jackknife import Estimate, assign_blocks
from svdit.evaluation.metrics import Data, frechet
from svdit.evaluation.statistics import Gaussian, Moments


def test_leave_one_out_is_the_textbook_error_of_a_mean():
    x = np.random.RandomState(0).randn(50)
    estimate = Estimate(x.mean(), tuple(np.delete(x, i).mean() for i in range(50)))
    assert estimate.se == pytest.approx(x.std(ddof=1) / np.sqrt(50), rel=1e-10)
    assert estimate.bias == pytest.approx(0, abs=1e-12)


def test_bias_of_the_plug_in_variance():
    x = np.random.RandomState(0).randn(50)
    estimate = Estimate(x.var(), tuple(np.delete(x, i).var() for i in range(50)))
    assert estimate.value - estimate.bias == pytest.approx(x.var(ddof=1), rel=1e-10)


def test_paired_difference_has_a_smaller_error_than_either_set():
    noise = np.random.RandomState(0).randn(20)
    a = Estimate(1.0, tuple(1 + noise))
    b = Estimate(3.0, tuple(3 + noise + 0.01 * np.roll(noise, 1)))
    difference = a.minus(b)
    assert difference.value == -2.0
    assert 0 < difference.se < 0.02 * a.se


def test_single_values_have_no_error():
    assert Estimate(1.0).se is None
    assert Estimate(1.0).bias is None
    assert Estimate(1.0).minus(Estimate(None, reason="why")) == Estimate(None, reason="why")


@pytest.mark.parametrize(("n", "blocks"), [(100, 20), (103, 20), (7, 20)])
def test_blocks_are_even_shuffled_and_repeatable(n: int, blocks: int):
    assigned = assign_blocks(n, blocks=blocks)
    sizes = np.bincount(assigned)
    assert len(sizes) == min(blocks, n)
    assert sizes.max() - sizes.min() <= 1
    np.testing.assert_array_equal(assigned, assign_blocks(n, blocks=blocks))
    assert (assigned != np.arange(n) % blocks).any()


def gaussian(x: np.ndarray) -> Gaussian:
    return Gaussian(x.mean(0), np.cov(x, rowvar=False), len(x))


def test_error_and_bias_of_fid_agree_with_monte_carlo():
    """D = 16, n = 400, 300 seeds: the jackknife must estimate both the spread over seeds and the bias."""
    D, n, seeds = 16, 400, 300
    scale = 1 / np.arange(1, D + 1)
    reference = Gaussian(np.full(D, 0.3), np.diag((1.3 * scale) ** 2))
    truth = D * 0.3**2 + (0.3**2 * scale**2).sum()
    blocks = assign_blocks(n)
    estimates = []
    for seed in range(seeds):
        x = (np.random.RandomState(seed).randn(n, D) * scale).astype(np.float32)
        value, *leave_out = jackknifed_distance(reference, gaussian(x), x, blocks)
        estimates.append(Estimate(value, tuple(leave_out)))
    values = np.array([e.value for e in estimates])
    assert np.sqrt(np.mean([e.se**2 for e in estimates])) == pytest.approx(values.std(ddof=1), rel=0.2)
    debiased = values - [e.bias for e in estimates]
    plain_error, error = values.mean() - truth, debiased.mean() - truth
    assert abs(error) < 3 * debiased.std() / np.sqrt(seeds)
    assert abs(plain_error) > 3 * abs(error)


def test_few_images_have_no_estimate_of_the_bias_of_fid():
    """It is that of c/N, which holds for twice as many images as features and more."""
    gaussian, generator = Moments(8).add(torch.randn(100, 8)).gaussian(), torch.Generator().manual_seed(0)
    for count in (15, 16):
        rows = torch.randn(count, 8, generator=generator)
        fake = Features({"pool": Moments(8).add(rows).gaussian()}, {"pool": rows.numpy()})
        data = Data(Features({"pool": gaussian}, {}), fake, assign_blocks(count), torch.device("cpu"))
        estimate = frechet(data, "pool")
        assert estimate.se
        assert (estimate.bias is None) == (estimate.minus(estimate).bias is None) == (count < 16)
