"""Against NumPy's mean and covariance; merging, removing, files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdit.errors import UserError
from svdit.evaluation.opening import open_source
from svdit.evaluation.statistics import Gaussian, Moments, Root, load_statistics, pivoted_cholesky, save_statistics


def rows(n: int, D: int = 6, seed: int = 0) -> np.ndarray:
    return (np.random.RandomState(seed).randn(n, D) * np.arange(1, D + 1) + 3).astype(np.float32)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) >= 2))
def test_any_split_into_batches_equals_numpys_mean_and_covariance(sizes: list[int]):
    x = rows(sum(sizes))
    sums = Moments(6)
    for batch in np.split(x, np.cumsum(sizes)[:-1]):
        sums.add(torch.from_numpy(batch))
    gaussian = sums.gaussian()
    assert gaussian.count == len(x)
    np.testing.assert_allclose(gaussian.mean, x.astype(np.float64).mean(0), atol=1e-10)
    np.testing.assert_allclose(gaussian.covariance, np.cov(x.astype(np.float64), rowvar=False), atol=1e-10)


def test_without_removes_rows_from_a_copy():
    x = torch.from_numpy(rows(20))
    sums = Moments(6).add(x)
    rest = sums.without(x[5:9]).gaussian()
    expected = Moments(6).add(x[:5]).add(x[9:]).gaussian()
    np.testing.assert_allclose(rest.covariance, expected.covariance, atol=1e-10)
    assert (rest.count, sums.count) == (16, 20)
    np.testing.assert_array_equal(sums.total, Moments(6).add(x).total)


def test_sums_are_float64():
    """A mean of 1000 standard deviations: float32 sums would change the third digit of the covariance."""
    x = rows(5000) + 1000
    got = Moments(6).add(torch.from_numpy(x)).gaussian().covariance
    np.testing.assert_allclose(got, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-6)


@pytest.mark.parametrize("n", [0, 1])
def test_a_covariance_needs_two_images(n: int):
    with pytest.raises(UserError, match=f"a covariance needs at least 2 images, found {n}"):
        Moments(6).add(torch.from_numpy(rows(n))).gaussian()


@pytest.mark.parametrize(("n", "rank"), [(3, 2), (6, 5), (40, 6)])
def test_root_is_a_factor_of_the_numerical_rank(n: int, rank: int):
    covariance = np.cov(rows(n).astype(np.float64), rowvar=False)
    root = pivoted_cholesky(covariance)
    factor = root.factor
    np.testing.assert_allclose(factor @ factor.T, covariance, atol=1e-11 * np.abs(covariance).max())
    other = np.cov(rows(40, seed=1).astype(np.float64), rowvar=False)
    np.testing.assert_allclose(np.tril(root.congruence(other)), np.tril(factor.T @ other @ factor), rtol=1e-9)
    assert root.rank == rank


def test_root_of_a_matrix_with_nan_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        pivoted_cholesky(np.full((2, 2), np.nan))


def test_saved_statistics_load_bit_by_bit_under_adms_names(tmp_path: Path):
    gaussians = {"pool": Moments(6).add(torch.from_numpy(rows(20))).gaussian()}
    gaussians["spatial"] = Moments(4).add(torch.from_numpy(rows(20, 4, 1))).gaussian()
    save_statistics(tmp_path / "s.npz", gaussians, "digest", features=rows(20))
    with np.load(tmp_path / "s.npz") as archive:
        assert {"mu", "sigma", "mu_s", "sigma_s", "features"} < set(archive.files)
    loaded, extractor = load_statistics(tmp_path / "s.npz")
    assert extractor == "digest"
    for layer, gaussian in gaussians.items():
        for name in ("mean", "covariance"):
            np.testing.assert_array_equal(getattr(loaded[layer], name), getattr(gaussian, name))
        np.testing.assert_array_equal(loaded[layer].root.lower, gaussian.root.lower)
        np.testing.assert_array_equal(loaded[layer].root.order, gaussian.root.order)
        assert loaded[layer].count == 20


def test_adms_file_is_read_as_float64_with_unknown_count(tmp_path: Path):
    np.savez(tmp_path / "adm.npz", mu=np.ones(3, np.float32), sigma=np.eye(3), arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    gaussians, extractor = load_statistics(tmp_path / "adm.npz")
    assert (list(gaussians), extractor, gaussians["pool"].count) == (["pool"], "inception", None)
    assert gaussians["pool"].mean.dtype == np.float64


@pytest.mark.parametrize(
    ("mean", "covariance", "sentence"),
    [
        (np.ones(3), np.eye(4), r"\(3,\) and \(4, 4\)"),
        (np.ones((3, 1)), np.eye(3), r"\(3, 1\) and \(3, 3\)"),
        (np.ones(3), np.full((3, 3), np.inf), "contains NaN or Inf"),
    ],
)
def test_malformed_statistics_are_refused(tmp_path: Path, mean: np.ndarray, covariance: np.ndarray, sentence: str):
    np.savez(tmp_path / "bad.npz", mu=mean, sigma=covariance)
    with pytest.raises(UserError, match=sentence):
        load_statistics(tmp_path / "bad.npz")


def test_a_saved_root_is_used():
    root = Root(np.eye(2), np.arange(2))
    assert Gaussian(np.zeros(2), 4 * np.eye(2), saved_root=root).root is root


def saved(path: Path, **arrays: np.ndarray) -> Path:
    """A file of saved statistics with some arrays replaced; None removes one."""
    save_statistics(path, {"pool": Moments(6).add(torch.from_numpy(rows(20))).gaussian()}, "digest")
    with np.load(path) as archive:
        content = {key: archive[key] for key in archive.files} | arrays
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    return path


@pytest.mark.parametrize("missing", ["root", "order"])
def test_statistics_with_half_a_root_get_theirs_computed(tmp_path: Path, missing: str):
    whole = load_statistics(saved(tmp_path / "whole.npz"))[0]["pool"]
    half = load_statistics(saved(tmp_path / "half.npz", **{missing: None}))[0]["pool"]
    assert half.saved_root is None
    np.testing.assert_array_equal(half.root.lower, whole.root.lower)


@pytest.mark.parametrize(
    "arrays", [{"root": np.eye(5)}, {"root": np.ones(6)}, {"order": np.zeros(6, np.int64)}, {"order": np.arange(6.0)}]
)
def test_roots_of_other_matrices_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray]):
    with pytest.raises(UserError, match=r"root and order in .* do not factor sigma"):
        load_statistics(saved(tmp_path / "s.npz", **arrays))


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [({"count": np.arange(2)}, "count in .* is not one int"), ({"mu": np.array(["x"] * 6)}, "mu in .* is <U1"),
     ({"root": np.full((6, 6), np.nan)}, "root and order in .* do not factor"),
     ({"features": np.zeros((20, 5), np.float32)}, "the width"),
     ({"features": np.zeros(20, np.float32)}, "expected float32"), ({"features": np.array(["x"])}, "expected float32")],
)  # fmt: skip
def test_other_malformed_arrays_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], sentence: str):
    with pytest.raises(UserError, match=sentence.replace("the width", r"\(N, 6\)")):
        open_source(saved(tmp_path / "s.npz", **arrays))
