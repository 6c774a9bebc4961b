"""The Fréchet distance between Gaussians (Dowson and Landau 1982; FID: Heusel et al. 2017, arXiv 1706.08500).

    d² = |m₁ - m₂|² + tr Σ₁ + tr Σ₂ - 2 tr (Σ₁ Σ₂)^½,     tr (Σ₁ Σ₂)^½ = Σᵢ λᵢ(Fᵀ Σ₂ F)^½,   Σ₁ = F Fᵀ

FᵀΣ₂F is symmetric, so no complex numbers and no general matrix square root appear. Of its eigenvalues only as many
as its rank are taken, the smaller of F's and of images less one: the rest is round-off, whose roots would add up to
1e-4. (A threshold instead of the rank would cut true eigenvalues of an ill-conditioned product.)
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from svdit.evaluation.statistics import Array, Gaussian, Moments

TILE = 2048


def frechet_distance(reference: Gaussian, other: Gaussian) -> float:
    """d² of two Gaussians of one width. The root is `reference`'s, which keeps it, or a much thinner one of `other`."""
    if reference.mean.shape != other.mean.shape:
        raise ValueError(f"features of width {reference.mean.size} and {other.mean.size} cannot be compared")
    if 2 * (other.count or np.inf) < other.mean.size:
        reference, other = other, reference
    rank = reference.root.rank if other.count is None else min(reference.root.rank, other.count - 1)
    product = reference.root.congruence(other.covariance)
    return _distance(reference, other.mean, np.trace(other.covariance), product, rank)


def leave_out_distances(
    reference: Gaussian, rows: npt.NDArray[np.float32], blocks: npt.NDArray[np.int64]
) -> tuple[float, ...]:
    """d² between the reference and `rows` (N, D) without each of the blocks (N,) they are in; none for one block."""
    if blocks.max() == 0:
        return ()
    few = len(rows) <= rows.shape[1]
    return tuple((_leave_out_few if few else _leave_out_many)(reference, rows, blocks))


def _leave_out_many(
    reference: Gaussian, rows: npt.NDArray[np.float32], blocks: npt.NDArray[np.int64]
) -> Iterator[float]:
    total = Moments(rows.shape[1])
    for start in range(0, len(rows), TILE):
        total.add(torch.from_numpy(rows[start : start + TILE]))
    for k in range(blocks.max() + 1):
        yield frechet_distance(reference, total.without(torch.from_numpy(rows[blocks == k])).gaussian())


def _leave_out_few(
    reference: Gaussian, rows: npt.NDArray[np.float32], blocks: npt.NDArray[np.int64]
) -> Iterator[float]:
    """With fewer rows than columns, the same eigenvalues from the (N, N) products of the projected rows."""
    x = rows.astype(np.float64)
    projected = x @ reference.root.factor
    products = projected @ projected.T
    for k in range(blocks.max() + 1):
        kept = np.flatnonzero(blocks != k)
        centred = products[np.ix_(kept, kept)]
        centred -= centred.mean(0)
        centred -= centred.mean(1, keepdims=True)
        mean = x[kept].mean(0)
        spread = np.square(x[kept]).sum() - len(kept) * (mean @ mean)
        rank = min(projected.shape[1], len(kept) - 1)
        yield _distance(reference, mean, spread / (len(kept) - 1), centred / (len(kept) - 1), rank)


def _distance(reference: Gaussian, mean: Array, trace: float, product: Array, rank: int) -> float:
    spectrum = np.linalg.eigvalsh(product)[-rank:]  # ascending
    cross = np.sqrt(spectrum.clip(0)).sum()
    shift = reference.mean - mean
    return float(shift @ shift + np.trace(reference.covariance) + trace - 2 * cross)
