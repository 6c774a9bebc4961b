"""Exact transforms of a layer's input that make it easier to quantize: x̂ = ((x − μ)/λ) H, Ŵ = (W Λ) H, b̂ = b + W μ.

Centring subtracts the mean, smoothing moves outlier channels into the weight (SmoothQuant's λ, balanced, or searched on
a grid as in SVDQuant), and the block Hadamard matrix spreads the remaining outliers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from svdit.kernels import reference as ref
from svdit.quant.config import Recipe
from svdit.quant.lowrank import truncated_svd
from svdit.quant.observe import Statistics

LIMITS = (1e-4, 1e4)  # of λ


@dataclass(frozen=True)
class Transform:
    """What is done to a layer's input; the weight changes so that the output does not."""

    shift: Tensor | None = None  # μ (I,)
    scale: Tensor | None = None  # λ (I,)
    hadamard: int = 0  # size of the Hadamard blocks; 0: none

    def inputs(self, x: Tensor) -> Tensor:
        """x̂ (M, I) for x (M, I)"""
        x = x if self.shift is None else x - self.shift
        x = x if self.scale is None else x / self.scale
        return mix(x, self.hadamard)

    def weight(self, W: Tensor) -> Tensor:
        """Ŵ (O, I) for W (O, I)"""
        return mix(W if self.scale is None else W * self.scale, self.hadamard)

    def second_moment(self, statistics: Statistics) -> Tensor:
        """E[x̂ x̂ᵀ] (I, I) float64 of unseen inputs, by congruence."""
        R = statistics.expected_moment(self.shift)
        if self.scale is not None:
            R.div_(self.scale).div_(self.scale[:, None])
        return mix(mix(R, self.hadamard).T, self.hadamard)


def mix(x: Tensor, block: int) -> Tensor:
    """`ref.rotate` of x (M, K) as one product: faster, and equal up to rounding, which matters at run time only."""
    if not block:
        return x
    H = ref.hadamard_matrix(block, x.device, x.dtype)
    return (x.reshape(-1, block) @ H).view(x.shape)


def candidates(count: int) -> list[tuple[float, float]]:
    """(α, β) of λ = absmax(x)^α / absmax(W)^β: (0, 0), (α, 0), (α, 1 − α), with α in steps of 2/(count + 1)."""
    if not count:
        return [(0.0, 0.0)]
    parts = (count + 1) // 2
    alphas = [i / parts for i in range(1, parts)]
    return [(0.0, 0.0), *((a, 0.0) for a in alphas), *((a, 1 - a) for a in alphas)]


def usable(scale: Tensor) -> Tensor:
    """λ (I,) within LIMITS; where dead inputs or columns of zeros make it 0 or infinite, the least or largest other."""
    live = scale[torch.isfinite(scale) & (scale > 0)]
    if not len(live):
        return torch.ones_like(scale)
    return scale.nan_to_num(nan=float(live.min())).clamp(live.min(), live.max()).clamp(*LIMITS)


def smoothing_scale(absmax: Tensor, W: Tensor, alpha: float, beta: float) -> Tensor:
    """λ (I,) of the grid for inputs with absmax (I,)."""
    return usable(absmax**alpha / W.abs().amax(0) ** beta)


def balanced_scale(W: Tensor, mean_square: Tensor, recipe: Recipe) -> Tensor:
    """λ (I,) = √(rms(x) / ‖r‖) for inputs of that mean square (I,) and r, the columns of W (O, I) less its low rank.

    Rounding x̂ and rounding r̂ both add an error in proportion to Σ rms(x)²/λ² · Σ ‖r‖² λ² over the columns that share a
    scale and are mixed by the rotation; by Cauchy and Schwarz this λ makes it least, for all such sets at once.
    """
    rank = 0 if recipe.low_rank == "none" else min(recipe.rank, *W.shape)
    if rank:
        l1, l2 = truncated_svd(W, rank, sweeps=2)
        W = W - l1 @ l2
    return usable((mean_square.sqrt() / W.norm(dim=0)).sqrt())


def choose_transform(W: Tensor, statistics: Statistics, recipe: Recipe) -> tuple[Transform, tuple[float, float]]:
    """The transform of W (O, I), and the exponents (α, β) of its λ.

    Balanced, or of the grid that with the least output error on the sample. As published, a candidate is evaluated with
    rounded inputs, a one-shot low-rank branch and weights to nearest.
    """
    shift = statistics.mean if recipe.centre else None
    if recipe.shift:
        shift = torch.full_like(statistics.mean, recipe.shift)
    if not recipe.smoothing:
        return Transform(shift, None, recipe.hadamard), (0.0, 0.0)
    if recipe.smoothing == "balanced":
        scale = balanced_scale(W, statistics.mean_square(shift), recipe)
        return Transform(shift, scale, recipe.hadamard), (0.5, 0.5)
    absmax, x = statistics.absmax(shift), statistics.sample
    Y = (x if shift is None else x - shift) @ W.T
    best, least, chosen = Transform(shift, None, recipe.hadamard), torch.inf, (0.0, 0.0)
    for alpha, beta in candidates(recipe.smoothing):
        transform = Transform(shift, smoothing_scale(absmax, W, alpha, beta), recipe.hadamard)
        error = float((rough_output(transform.inputs(x), transform.weight(W), recipe) - Y).square().sum())
        if error <= least:
            best, least, chosen = transform, error, (alpha, beta)
    return best, chosen


def rough_output(hat: Tensor, What: Tensor, recipe: Recipe) -> Tensor:
    """The output (M, O), without bias, for x̂ (M, I) and Ŵ (O, I), by the fastest variant of the recipe."""
    assert recipe.weight is not None, "smoothing is of no use without a residual"
    rounded = ref.fake_quantize(hat, recipe.act) if recipe.act else hat
    rank = 0 if recipe.low_rank == "none" else min(recipe.rank, *What.shape)
    if not rank:
        return rounded @ ref.fake_quantize(What, recipe.weight).T
    l1, l2 = truncated_svd(What, rank, sweeps=2)
    return rounded @ ref.fake_quantize(What - l1 @ l2, recipe.weight).T + (hat @ l2.T) @ l1.T
