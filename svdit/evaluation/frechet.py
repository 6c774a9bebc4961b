"""The Fréchet distance between Gaussians (Dowson and Landau 1982; FID: Heusel et al. 2017, arXiv 1706.08500).

    d² = |m₁ - m₂|² + tr Σ₁ + tr Σ₂ - 2 tr (Σ₁ Σ₂)^½,     tr (Σ₁ Σ₂)^½ = Σᵢ λᵢ(Fᵀ Σ₂ F)^½,   Σ₁ = F Fᵀ

FᵀΣ₂F is symmetric, so neither complex numbers nor a general matrix square root appear. Only its largest eigenvalues
are used, as many as its rank: the smaller of F's rank and the number of images less one. The others are round-off,
whose square roots would sum to 1e-4. (A threshold would remove true eigenvalues of an ill-conditioned product.)
"""

import numpy as np
import torch

from svdit.evaluation.jackknife import Blocks
from svdit.evaluation.rows import Rows
from svdit.evaluation.statistics import Array, Gaussian, Moments

TILE = 2048


def frechet_distance(reference: Gaussian, other: Gaussian) -> float:
    """d² of two Gaussians. Uses `reference.root`, which is cached. Raises ValueError if their widths differ."""
    if reference.mean.shape != other.mean.shape:
        raise ValueError(f"features of width {reference.mean.size} and {other.mean.size} cannot be compared")
    root = reference.root
    rank = root.rank if other.count is None else min(root.rank, other.count - 1)
    return _distance(reference, other.mean, np.trace(other.covariance), root.congruence(other.covariance), rank)


def jackknifed_distance(reference: Gaussian, other: Gaussian, rows: Rows, blocks: Blocks) -> list[float]:
    """d² of `other`, the summary of `rows` (N, D), then d² without each block; a single block is not left out."""
    K = int(blocks.max()) + 1
    kept = [np.flatnonzero(blocks != k) for k in range(K)] if K > 1 else []
    if len(rows) <= rows.shape[1]:
        return _distances_of_few(reference, rows, [np.arange(len(rows)), *kept])
    whole = frechet_distance(reference, other)
    if not kept:
        return [whole]
    total = Moments(rows.shape[1])
    for start in range(0, len(rows), TILE):
        total.add(torch.from_numpy(rows[start : start + TILE]))
    rest = (total.without(torch.from_numpy(rows[blocks == k])) for k in range(len(kept)))
    return [whole, *(frechet_distance(reference, sums.gaussian()) for sums in rest)]


def _distances_of_few(reference: Gaussian, rows: Rows, subsets: list[Blocks]) -> list[float]:
    """With fewer rows than columns: the same eigenvalues, from the (N, N) inner products of the projected rows."""
    x = rows.astype(np.float64)
    projected = x @ reference.root.factor
    products = projected @ projected.T
    distances = []
    for subset in subsets:
        centred = products[np.ix_(subset, subset)]
        centred -= centred.mean(0)
        centred -= centred.mean(1, keepdims=True)
        n, mean = len(subset), x[subset].mean(0)
        spread = np.square(x[subset]).sum() - n * (mean @ mean)
        rank = min(projected.shape[1], n - 1)
        distances.append(_distance(reference, mean, spread / (n - 1), centred / (n - 1), rank))
    return distances


def _distance(reference: Gaussian, mean: Array, trace: float, product: Array, rank: int) -> float:
    spectrum = np.linalg.eigvalsh(product)[-rank:]  # ascending, from the lower triangle
    cross = np.sqrt(spectrum.clip(0)).sum()
    shift = reference.mean - mean
    return float(shift @ shift + np.trace(reference.covariance) + trace - 2 * cross)
