"""Low-rank factors against NumPy's SVD and the closed form of the weighted problem."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from svdit.quant.lowrank import balanced_svd, output_error, truncated_svd, weighted_svd


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def moment(features: int, seed: int = 5) -> torch.Tensor:
    x = matrix(4 * features, features, seed).double() * torch.logspace(-1, 1, features).double()
    return x.T @ x / len(x)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)])
@given(rank=st.integers(1, 24))
@settings(max_examples=8)
def test_truncated_svd_leaves_the_tail(shape: tuple[int, int], rank: int) -> None:
    A = matrix(*shape)
    l1, l2 = truncated_svd(A, rank)
    tail = np.linalg.svd(A.double().numpy(), compute_uv=False)[rank:]
    assert float((A - l1 @ l2).norm()) == pytest.approx(float(np.sqrt((tail**2).sum())), rel=1e-4, abs=1e-4)


def with_singular_values(S: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    U, V = (torch.linalg.qr(matrix(size, len(S), size).double())[0] for size in (rows, columns))
    return ((U * S.double()) @ V.T).float()


SPECTRA = {  # of 24 singular values
    "8 decades": torch.logspace(0, -8, 24),
    "8 decades, large": torch.logspace(12, 4, 24),
    "a plateau": torch.tensor([4.0] * 8 + [2.0] * 8 + [1.0] * 8),
    "rank 10": torch.tensor([3.0] * 10 + [0.0] * 14),
    "rank 1": torch.tensor([5.0] + [0.0] * 23),
    "tiny": torch.full((24,), 1e-30),
    "zeros": torch.zeros(24),
}


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize("name", SPECTRA)
def test_balanced_svd_equals_numpys(name: str, shape: tuple[int, int]) -> None:
    W = with_singular_values(SPECTRA[name], *shape)
    U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    for rank in (1, 8, 16, 23, 24):
        l1, l2 = balanced_svd(W, rank)
        assert l1.shape == (shape[0], rank) and l2.shape == (rank, shape[1])
        product, size = (l1.double() @ l2.double()).numpy(), np.linalg.norm(S[:rank])
        tail = np.linalg.norm(S[rank:])
        assert abs(np.linalg.norm(W.double().numpy() - product) - tail) <= 1e-6 * size
        if rank == 24 or S[rank - 1] > 1.01 * S[rank] or S[rank] < 1e-6 * size:  # else the product is not unique
            assert np.linalg.norm(product - (U[:, :rank] * S[:rank]) @ Vh[:rank]) <= 1e-6 * size


@given(rows=st.integers(1, 30), columns=st.integers(1, 30), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=30)
def test_balanced_factors_are_equally_long_and_leave_the_tail(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    A = matrix(rows, columns, seed) * torch.logspace(0, -data.draw(st.integers(0, 6)), columns)
    rank = data.draw(st.integers(1, min(A.shape)))
    l1, l2 = balanced_svd(A, rank)
    S = np.linalg.svd(A.double().numpy(), compute_uv=False)
    assert torch.allclose(l1.norm(dim=0), l2.norm(dim=1), rtol=1e-5)
    np.testing.assert_allclose(l1.double().norm(dim=0).square(), S[:rank], rtol=1e-5, atol=1e-7 * S[0])
    assert float((A - l1.double() @ l2.double()).norm()) == pytest.approx(np.linalg.norm(S[rank:]), abs=1e-6 * S[0])


def test_balanced_svd_does_not_depend_on_the_number_of_threads() -> None:
    W, factors = matrix(300, 200), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            factors.append(balanced_svd(W, 150))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for pair in factors[1:] for a, b in zip(pair, factors[0], strict=True))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_weighted_svd_equals_qeras_closed_form(shape: tuple[int, int]) -> None:
    A, R = matrix(*shape), moment(shape[1])
    root = torch.linalg.cholesky(R)
    half = np.real(sqrtm(R.numpy()))  # QERA: SVD of A R^½, then times R^−½
    U, S, Vt = np.linalg.svd(A.double().numpy() @ half, full_matrices=False)
    expected = (U[:, :5] * S[:5]) @ Vt[:5] @ np.linalg.inv(half)
    for given_root in (None, root):
        l1, l2 = weighted_svd(A, R, 5, given_root)
        np.testing.assert_allclose((l1 @ l2).numpy(), expected, atol=2e-5)


@given(seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_output_error_never_rises_with_rank_and_weighting_never_hurts(seed: int) -> None:
    A, R = matrix(20, 16, seed), moment(16, seed + 1)
    errors = [output_error(A - l1 @ l2, R) for l1, l2 in (weighted_svd(A, R, r) for r in range(1, 17))]
    assert all(b <= a * (1 + 1e-6) + 1e-9 for a, b in pairwise(errors))
    l1, l2 = truncated_svd(A, 4)
    assert errors[3] <= output_error(A - l1 @ l2, R) * (1 + 1e-6)


def test_few_of_many_directions_capture_nearly_the_most() -> None:
    A = matrix(900, 700) * torch.logspace(0, -0.5, 700)
    l1, l2 = truncated_svd(A, 16)
    best = np.linalg.svd(A.double().numpy(), compute_uv=False)[16:]
    assert best.dot(best) ** 0.5 <= float((A - l1 @ l2).norm()) < 1.0005 * best.dot(best) ** 0.5
