"""Exact changes of a layer's input that make it easier to round: x̂ = ((x − μ)/λ) H, Ŵ = (W Λ) H, b̂ = b + W μ.

Centring takes the mean out, smoothing moves outlier channels into the weight (SmoothQuant's λ, searched on a grid
as in SVDQuant), the block Hadamard matrix spreads what remains.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from svdit.kernels import reference as ref
from svdit.quant.config import Recipe
from svdit.quant.lowrank import truncated_svd
from svdit.quant.observe import Statistics

LIMITS = (1e-4, 1e4)  # of λ
TRIED = 512  # rows of the sample that a candidate is tried on


@dataclass
class Transform:
    """Shift (I,) or None, scale λ (I,) or None, and the size of the Hadamard blocks (0: none)."""

    shift: Tensor | None = None
    scale: Tensor | None = None
    hadamard: int = 0

    def inputs(self, x: Tensor) -> Tensor:
        x = x if self.shift is None else x - self.shift
        x = x if self.scale is None else x / self.scale
        return mix(x, self.hadamard)

    def weight(self, W: Tensor) -> Tensor:
        return mix(W if self.scale is None else W * self.scale, self.hadamard)

    def second_moment(self, statistics: Statistics) -> Tensor:
        """E[x̂ x̂ᵀ] (I, I) float64, by congruence."""
        R = statistics.second_moment(self.shift)
        if self.scale is not None:
            R.div_(self.scale).div_(self.scale[:, None])
        return mix(mix(R, self.hadamard).T, self.hadamard)


def mix(x: Tensor, block: int) -> Tensor:
    """`ref.rotate` as one product: quicker, and equal but for the last bits, which matter to codes only."""
    if not block:
        return x
    H = ref.hadamard_matrix(block, x.device, x.dtype)
    return (x.reshape(-1, block) @ H).view(x.shape)


def candidates(count: int) -> list[tuple[float, float]]:
    """(α, β) of λ = max|x|^α / max|W|^β: (0, 0), (α, 0), (α, 1 − α); 39, 19, 7 are steps of 1/20, 1/10, 1/4 in α."""
    if not count:
        return [(0.0, 0.0)]
    parts = (count + 1) // 2
    alphas = [i / parts for i in range(1, parts)]
    return [(0.0, 0.0), *((a, 0.0) for a in alphas), *((a, 1 - a) for a in alphas)]


def smoothing_scale(largest: Tensor, W: Tensor, alpha: float, beta: float) -> Tensor:
    """λ (I,) within LIMITS; 1 where it is not a positive number, as for dead channels."""
    scale = largest**alpha / W.abs().amax(0) ** beta
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, torch.ones_like(scale))
    return scale.clamp(*LIMITS)


def choose_transform(W: Tensor, statistics: Statistics, recipe: Recipe) -> tuple[Transform, tuple[float, float]]:
    """The transform of W (O, I) that leaves the least output error on the sample, and its (α, β).

    As published, a candidate is tried with rounded inputs, a one-shot low-rank branch and weights to nearest.
    """
    shift = statistics.mean if recipe.centre else None
    if recipe.shift:
        shift = torch.full_like(statistics.mean, recipe.shift)
    largest = statistics.largest(shift)
    best, least, chosen = Transform(shift, None, recipe.hadamard), torch.inf, (0.0, 0.0)
    grid = candidates(recipe.smoothing)
    if len(grid) == 1:
        return best, chosen
    x = statistics.choosing[:TRIED]
    Y = (x if shift is None else x - shift) @ W.T
    for alpha, beta in grid:
        transform = Transform(shift, smoothing_scale(largest, W, alpha, beta), recipe.hadamard)
        error = float((rough_output(transform.inputs(x), transform.weight(W), recipe) - Y).square().sum())
        if error <= least:
            best, least, chosen = transform, error, (alpha, beta)
    return best, chosen


def rough_output(hat: Tensor, What: Tensor, recipe: Recipe) -> Tensor:
    """The output (M, O), without a bias, of a transformed weight and inputs under the quickest form of the recipe."""
    assert recipe.weight is not None
    rounded = ref.fake_quantize(hat, recipe.act) if recipe.act else hat
    rank = 0 if recipe.low_rank == "none" else min(recipe.rank, *What.shape)
    if not rank:
        return rounded @ ref.fake_quantize(What, recipe.weight).T
    l1, l2 = truncated_svd(What, rank, sweeps=2)
    return rounded @ ref.fake_quantize(What - l1 @ l2, recipe.weight).T + (hat @ l2.T) @ l1.T
