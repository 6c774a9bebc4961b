"""Against torch-fidelity, against ADM's formulas in plain NumPy, and against loops over the definitions."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from svdit.evaluation import metrics
from svdit.evaluation.frechet import frechet_distance
from svdit.evaluation.jackknife import assign_blocks
from svdit.evaluation.statistics import Gaussian


def rows(n: int, D: int = 12, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return (np.random.RandomState(seed).randn(n, D) + shift).astype(np.float32)


def adm_inception_score(logits: np.ndarray, split: int) -> float:
    """ADM's evaluator: splits of a fixed size in the given order, the last one shorter."""
    z = logits.astype(np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    scores = []
    for i in range(0, len(p), split):
        part = p[i : i + split]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    return float(np.mean(scores))


def test_inception_score_of_one_split_is_adms():
    logits = rows(300, 20) * 2
    score = metrics.inception_score(logits, assign_blocks(300))
    assert list(score) == ["is"]
    assert score["is"].value == pytest.approx(adm_inception_score(logits, 5000), rel=1e-12)


@pytest.mark.parametrize(("n", "splits"), [(9, 1), (19, 3), (23, 4), (200, 4)])
def test_inception_score_splits_like_torch_fidelity(monkeypatch: pytest.MonkeyPatch, n: int, splits: int):
    monkeypatch.setattr(metrics, "IS_SPLIT_SIZE", 5)
    monkeypatch.setattr(metrics, "IS_SPLITS", 4)
    logits = rows(n, 20) * 2
    score = metrics.inception_score(logits, assign_blocks(n))
    expected = isc_features_to_metric(torch.from_numpy(logits), splits, True, 2020)
    assert score["is"].value == expected["inception_score_mean"]
    assert ("is_std" in score) == (splits > 1)
    if splits > 1:
        assert score["is_std"].value == expected["inception_score_std"]


def test_class_order_does_not_lower_the_score():
    """Sorted files in ADM's order score the classes of one split; shuffled they score them all."""
    labels = np.arange(1000) // 20
    logits = (10 * np.eye(50)[labels]).astype(np.float32)
    assert adm_inception_score(logits, 100) < 6
    assert metrics.inception_score(logits, assign_blocks(1000))["is"].value > 40


def test_leave_out_scores_equal_scores_without_the_rows():
    logits, blocks = rows(60, 8), assign_blocks(60, blocks=6)
    left = metrics.inception_score(logits, blocks)["is"].leave_out
    expected = [adm_inception_score(logits[blocks != k], 5000) for k in range(6)]
    assert left == pytest.approx(expected, rel=1e-10)
    assert np.std(left) > 0


def test_leave_out_scores_keep_their_splits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "IS_SPLIT_SIZE", 20)
    logits, blocks = rows(60, 8), assign_blocks(60, blocks=6)
    splits = np.random.RandomState(2020).permutation(60).reshape(3, 20)
    expected = [np.mean([adm_inception_score(logits[s[blocks[s] != k]], 5000) for s in splits]) for k in range(6)]
    assert metrics.inception_score(logits, blocks)["is"].leave_out == pytest.approx(expected, rel=1e-10)


def test_kid_is_torch_fidelitys(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", 100)
    real, fake = (torch.from_numpy(rows(n, seed=n, shift=s)) for n, s in ((150, 0.0), (120, 0.3)))
    estimates = metrics.kernel_distance(real, fake, assign_blocks(120))
    options = {"kid_subsets": 100, "kid_subset_size": 100, "rng_seed": 2020, "verbose": False}
    expected = kid_features_to_metric(fake, real, **options)
    assert estimates["kid"].value == expected["kernel_inception_distance_mean"]
    assert estimates["kid_std"].value == expected["kernel_inception_distance_std"]
    assert estimates["kid_full"].value == pytest.approx(estimates["kid"].value, rel=0.1)


def kernel_statistic(real: np.ndarray, fake: np.ndarray) -> float:
    def mean(a: np.ndarray, b: np.ndarray) -> float:
        k = (a.astype(np.float64) @ b.astype(np.float64).T / a.shape[1] + 1) ** 3
        return float(k[~np.eye(len(a), dtype=bool)].mean() if a is b else k.mean())

    return mean(real, real) + mean(fake, fake) - 2 * mean(real, fake)


@pytest.mark.parametrize("tile", [7, 4096])
def test_full_kid_is_the_u_statistic_with_and_without_blocks(monkeypatch: pytest.MonkeyPatch, tile: int):
    monkeypatch.setattr(metrics, "TILE", tile)
    real, fake, blocks = rows(31), rows(40, seed=1, shift=0.2), assign_blocks(40, blocks=6)
    statistic = metrics.kernel_distance(torch.from_numpy(real), torch.from_numpy(fake), blocks)["kid_full"]
    assert statistic.value == pytest.approx(kernel_statistic(real, fake), rel=1e-5)
    expected = [kernel_statistic(real, fake[blocks != k]) for k in range(6)]
    assert statistic.leave_out == pytest.approx(expected, rel=1e-4)


def test_full_kid_is_unbiased():
    values = []
    for seed in range(60):
        x = torch.from_numpy(rows(80, seed=seed))
        values.append(metrics.kernel_distance(x[:40], x[40:], np.zeros(40, np.int64))["kid_full"].value)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(60)


def explicit_mind(real: torch.Tensor, fake: torch.Tensor) -> float:
    """The definition, direction by direction; the draws are in the order of torch-fidelity's development branch.

    torch-fidelity 0.4.0 has no MIND, so the oracle is the formula of arXiv 2605.06797.
    """
    stream, n = torch.Generator().manual_seed(2020), min(len(real), len(fake))
    if len(fake) > n:
        fake = fake[torch.randperm(len(fake), generator=stream)[:n]]
    if len(real) > n:
        real = real[torch.randperm(len(real), generator=stream)[:n]]
    total = 0.0
    for u in torch.randn(1000, real.shape[1], generator=stream):
        a, b = (np.sort((x @ (u / u.norm())).numpy().astype(np.float64)) for x in (fake, real))
        total += ((a - b) ** 2).mean()
    return 3 * real.shape[1] * total / 1000


@pytest.mark.parametrize(("n_real", "n_fake"), [(30, 30), (45, 30), (30, 45)])
def test_mind_is_its_definition(n_real: int, n_fake: int):
    real, fake = torch.from_numpy(rows(n_real)), torch.from_numpy(rows(n_fake, seed=1, shift=0.5))
    assert metrics.monge_distance(real, fake).value == pytest.approx(explicit_mind(real, fake), rel=1e-5)


def test_fid_infinity_removes_the_bias_of_few_images():
    """D = 8: the true distance of N(0, I) and N(0.2, I) is 0.32; with 400 images FID is a third larger."""
    D, reference = 8, Gaussian(np.zeros(8), np.eye(8))
    values, plain = [], []
    for seed in range(40):
        x = (np.random.RandomState(seed).randn(400, D) + 0.2).astype(np.float32)
        values.append(metrics.fid_infinity(reference, x, start=40).value)
        summed = Gaussian(x.mean(0).astype(np.float64), np.cov(x, rowvar=False), 400)
        plain.append(frechet_distance(reference, summed))
    error = 3 * np.std(values) / np.sqrt(40)
    assert abs(np.mean(values) - 0.32) < error
    assert np.mean(plain) - 0.32 > error


def test_fid_infinity_needs_a_range_of_sizes():
    with pytest.raises(ValueError, match="at least 4000 images for its line, found 100"):
        metrics.fid_infinity(Gaussian(np.zeros(12), np.eye(12)), rows(100))
