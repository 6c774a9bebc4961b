"""Against the closed form for diagonal Gaussians, SciPy's matrix square root, and torch-fidelity's function."""

import numpy as np
import pytest
import scipy.linalg

from svdit.evaluation.frechet import frechet_distance, jackknifed_distance
from svdit.evaluation.jackknife import assign_blocks
from svdit.evaluation.statistics import Gaussian
from svdit.shims import allow_cpu_torchvision


def sample(n: int, D: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Correlated features (n, D) with a decaying spectrum, as a network's are."""
    stream = np.random.RandomState(seed)
    mix = np.random.RandomState(99).randn(D, D) / np.arange(1, D + 1) ** 0.7
    return (stream.randn(n, D) @ mix * scale + shift).astype(np.float32)


def gaussian(x: np.ndarray) -> Gaussian:
    x = x.astype(np.float64)
    return Gaussian(x.mean(0), np.cov(x, rowvar=False), len(x))


def exact_cross(x: np.ndarray, y: np.ndarray) -> float:
    """tr (Σ₁Σ₂)^½ as the nuclear norm of the product of the centred data, which no round-off eigenvalue enters."""
    a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x.astype(np.float64), y.astype(np.float64)))
    return float(np.linalg.svd(a @ b.T, compute_uv=False).sum())


def test_diagonal_gaussians_have_a_closed_form():
    stream = np.random.RandomState(0)
    m1, m2, s1, s2 = stream.rand(4, 64) + 0.1
    expected = ((m1 - m2) ** 2 + (s1 - s2) ** 2).sum()
    distance = frechet_distance(Gaussian(m1, np.diag(s1**2)), Gaussian(m2, np.diag(s2**2)))
    assert distance == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "D"), [(500, 64), (2000, 256)])
def test_equals_scipy_and_torch_fidelity_at_full_rank(n: int, D: int):
    allow_cpu_torchvision()
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    a, b = gaussian(sample(n, D)), gaussian(sample(n, D, seed=1, scale=1.2, shift=0.1))
    distance = frechet_distance(a, b)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    shift = a.mean - b.mean
    assert distance == pytest.approx(shift @ shift + np.trace(a.covariance + b.covariance - 2 * root), abs=1e-6)
    stats = [{"mu": g.mean, "sigma": g.covariance} for g in (a, b)]
    assert distance == pytest.approx(fid_statistics_to_metric(*stats, False)["frechet_inception_distance"], abs=1e-6)
    assert distance == pytest.approx(frechet_distance(b, a), abs=1e-9)
    assert distance > 1


@pytest.mark.parametrize(("n1", "n2"), [(8, 400), (400, 8), (8, 8), (100, 300)])
def test_singular_covariances_add_no_round_off(n1: int, n2: int):
    x, y = sample(n1, 256), sample(n2, 256, seed=1, scale=1.2, shift=0.1)
    a, b = gaussian(x), gaussian(y)
    exact = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance) - 2 * exact_cross(x, y)
    assert frechet_distance(a, b) == pytest.approx(exact, abs=1e-7)
    assert a.root.rank == min(256, n1 - 1)


def test_a_set_is_at_distance_zero_from_itself():
    for n in (8, 400):
        g = gaussian(sample(n, 256))
        assert abs(frechet_distance(g, g)) < 1e-8


@pytest.mark.parametrize("n", [30, 80])
def test_leave_out_values_equal_distances_without_the_block(n: int):
    """30 rows of 48 columns use the inner products of the rows, 80 rows the covariance."""
    rows, blocks, reference = sample(n, 48, seed=3), assign_blocks(n, blocks=7), gaussian(sample(300, 48))
    kept = [np.ones(n, bool), *(blocks != k for k in range(7))]
    expected = [frechet_distance(reference, gaussian(rows[subset])) for subset in kept]
    whole = gaussian(rows)
    assert jackknifed_distance(reference, whole, rows, blocks) == pytest.approx(expected, abs=1e-9)
    assert jackknifed_distance(reference, whole, rows, 0 * blocks) == pytest.approx(expected[:1], abs=1e-9)
    assert np.std(expected) > 1e-3


def test_widths_must_agree():
    with pytest.raises(ValueError, match="width 3 and 4"):
        frechet_distance(Gaussian(np.zeros(3), np.eye(3)), Gaussian(np.zeros(4), np.eye(4)))


def test_a_repeated_image_has_a_zero_covariance():
    still, moving = gaussian(np.ones((5, 16), np.float32)), gaussian(sample(40, 16))
    expected = ((still.mean - moving.mean) ** 2).sum() + np.trace(moving.covariance)
    assert frechet_distance(still, moving) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(moving, still) == pytest.approx(expected, rel=1e-12)
