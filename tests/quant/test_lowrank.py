"""Low-rank factors against NumPy's SVD and the closed form of the weighted problem."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from svdit.quant.lowrank import output_error, truncated_svd, weighted_svd


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
