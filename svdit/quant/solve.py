"""One layer, as in SVDQuant's figure: transform, split off the low rank, round the residual, assemble.

    Ŵ = L1 L2 + Res,    Y ≈ Qa(x̂) Q(Res)ᵀ + (x̂ L2ᵀ) L1ᵀ + b̂        (arXiv 2411.05007)

The residual is always that of the factors as stored. `SPLITS` holds one function per `Recipe.low_rank`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from svdit.errors import UserError
from svdit.kernels import reference as ref
from svdit.kernels.formats import Format
from svdit.quant.config import LowRank, Recipe
from svdit.quant.gptq import DAMPING, Inverse, damped_cholesky_
from svdit.quant.linear import LinearSpec, SVDLinear, rank_for_ratio
from svdit.quant.lowrank import Factors, balanced_svd, truncated_svd, weighted_svd
from svdit.quant.observe import Statistics
from svdit.quant.report import LayerReport
from svdit.quant.rounding import round_weight
from svdit.quant.transforms import Transform, choose_transform


@dataclass(frozen=True)
class Problem:
    """What is split into a low-rank branch and a rounded residual: a transformed weight, and its inputs if observed."""

    weight: Tensor  # Ŵ (O, I)
    recipe: Recipe  # with the rank of this layer
    moment: Tensor | None = None  # E[x̂ x̂ᵀ] (I, I) float64
    rows: Tensor | None = None  # x̂ (M, I)

    @property
    def form(self) -> Format:
        """The format of the residual."""
        assert self.recipe.weight is not None, "Recipe allows None for low_rank='factors' only"
        return self.recipe.weight

    @cached_property
    def inverse(self) -> Inverse | None:
        """For GPTQ."""
        return Inverse(self.moment) if self.moment is not None and self.recipe.rounding == "gptq" else None

    @cached_property
    def root(self) -> Tensor:
        """A Cholesky factor (I, I) of the second moment, damped as little as it needs."""
        assert self.moment is not None
        return damped_cholesky_(self.moment.clone(), 1e-6, self.moment.diagonal().mean())[0]


class Split(NamedTuple):
    """Factors as stored, and the residual's codes and scales; either may be missing."""

    factors: Factors | None
    codes: Tensor | None = None
    scales: ref.Scales | None = None
    error: float = math.inf


@torch.no_grad()
def quantize_linear(
    name: str, linear: nn.Linear, recipe: Recipe, statistics: Statistics | None
) -> tuple[SVDLinear, LayerReport]:
    """The quantized layer and its report."""
    W = linear.weight.detach().float()
    recipe, note = fit(recipe, W), ""
    if statistics and recipe.needs_inputs and not statistics.vary(recipe.centre):
        recipe, note = without_inputs(recipe), "its inputs are constant: plain SVD and rounding to nearest"
    transform, (alpha, beta) = Transform(None, None, recipe.hadamard), (0.0, 0.0)
    if statistics and (recipe.centre or recipe.shift or recipe.smoothing):
        transform, (alpha, beta) = choose_transform(W, statistics, recipe)
    problem = pose(W, recipe, transform, None if note else statistics)
    layer = assemble(linear, recipe, transform, SPLITS[recipe.low_rank](problem))
    if problem.inverse and problem.inverse.damping > DAMPING:
        note = f"GPTQ needed damping {problem.inverse.damping:g}"
    report = LayerReport(
        name=name,
        weight=str(recipe.weight or recipe.factors or recipe.factor_dtype),
        act=str(recipe.act or "as is"),
        rank=layer.spec.rank,
        numbers_before=W.numel(),
        numbers_after=W.numel() * (recipe.weight is not None) + recipe.rank * sum(W.shape),
        residual=recipe.weight is not None,
        bytes_before=sum(p.nbytes for p in linear.parameters()),
        bytes_after=layer.spec.nbytes(W.shape[0], W.shape[1], layer.bias is not None),
        sqnr=layer_sqnr(linear, layer, statistics.holdout_rows) if statistics else None,
        weight_error=relative_error(layer.effective_weight(), W),
        alpha=alpha,
        beta=beta,
        note=note,
        inputs=linear.in_features,
        rows=statistics.count if statistics else 0,
        held_out=len(statistics.holdout_rows) if statistics else 0,
    )
    return layer, report


def fit(recipe: Recipe, W: Tensor) -> Recipe:
    """The recipe for W (O, I): its rank, and a Hadamard block that divides I."""
    O, I = W.shape
    if recipe.low_rank == "none":
        rank = 0
    elif recipe.rank_ratio is not None:
        rank = rank_for_ratio(recipe.rank_ratio, I, O)
    else:
        rank = min(recipe.rank, O, I)
    block = recipe.hadamard
    while block and I % block:
        block //= 2
    low_rank: LowRank = recipe.low_rank if rank else "none"
    return replace(recipe, rank=rank, low_rank=low_rank, hadamard=block if block > 1 else 0)


def without_inputs(recipe: Recipe) -> Recipe:
    """The recipe for a layer whose inputs are constant: nothing can be weighted by them."""
    low_rank: LowRank = "svd" if recipe.low_rank in ("correction", "alternated") else recipe.low_rank
    return replace(recipe, low_rank=low_rank, smoothing=0, search_scales=False, rounding="nearest", whiten=False)


def uncalibrated(recipe: Recipe) -> Recipe:
    """The recipe without what needs the layers' inputs: plain SVD, rounding to nearest, no centring or smoothing."""
    return replace(without_inputs(recipe), centre=False)


def pose(W: Tensor, recipe: Recipe, transform: Transform, statistics: Statistics | None) -> Problem:
    """The problem of W (O, I) after the transform."""
    if statistics is None or not recipe.needs_inputs:
        return Problem(transform.weight(W), recipe)
    moment, rows = transform.second_moment(statistics), transform.inputs(statistics.sample)
    return Problem(transform.weight(W), recipe, moment, rows)


def split_none(problem: Problem) -> Split:
    """No low-rank branch: the rounded weight."""
    return Split(None, *rounded(problem, problem.weight))


def split_factors(problem: Problem) -> Split:
    """The truncated SVD, plain or weighted by the inputs, without a residual."""
    W, recipe = problem.weight, problem.recipe
    return Split(stored(recipe, weighted(problem, W) if recipe.whiten else balanced_svd(W, recipe.rank)))


def split_svd(problem: Problem) -> Split:
    """The truncated SVD, and the rounded residual."""
    factors = stored(problem.recipe, truncated_svd(problem.weight, problem.recipe.rank))
    return Split(factors, *rounded(problem, residual(problem, factors)))


def split_iterated(problem: Problem) -> Split:
    """SVDQuant as published: SVD of what rounding to nearest left, until the output error first grows."""
    best, Q = Split(None), torch.zeros_like(problem.weight)
    for _ in range(problem.recipe.iterations):
        factors = stored(problem.recipe, truncated_svd(problem.weight - Q, problem.recipe.rank))
        codes, scales = round_weight(residual(problem, factors), problem.form)
        Q = ref.dequantize(codes, scales, problem.form)
        split = Split(factors, codes, scales, output_error(problem, factors, Q))
        if split.error > best.error:
            break
        best = split
    if problem.inverse is None:
        return best
    return Split(best.factors, *rounded(problem, residual(problem, best.factors)))


def split_correction(problem: Problem) -> Split:
    """QERA: the best low-rank correction of the rounding error under the inputs' second moment."""
    codes, scales = rounded(problem, problem.weight)
    return Split(refit(problem, problem.weight - ref.dequantize(codes, scales, problem.form)), codes, scales)


def split_alternated(problem: Problem) -> Split:
    """From the plain SVD: round the residual, refit the factors to what is left, in turn; the best before or after a
    refit.

    It ends where a refit does not help, as with 8 bits: rounding the residual corrects that the factors are rounded to
    bf16, but nothing corrects it in refitted ones, where it costs more than the refit gains.
    """
    factors, splits = stored(problem.recipe, truncated_svd(problem.weight, problem.recipe.rank)), list[Split]()
    for _ in range(problem.recipe.iterations):
        codes, scales = rounded(problem, residual(problem, factors))
        Q = ref.dequantize(codes, scales, problem.form)
        refitted = refit(problem, problem.weight - Q)
        before, after = (Split(each, codes, scales, output_error(problem, each, Q)) for each in (factors, refitted))
        splits += before, after
        if after.error >= before.error:
            break
        factors = refitted
    return min(splits, key=lambda split: split.error)


SPLITS: dict[LowRank, Callable[[Problem], Split]] = {
    "none": split_none,
    "factors": split_factors,
    "svd": split_svd,
    "iterated": split_iterated,
    "correction": split_correction,
    "alternated": split_alternated,
}


def residual(problem: Problem, factors: Factors | None) -> Tensor:
    """Ŵ − L1 L2, (O, I)"""
    return problem.weight if factors is None else problem.weight - factors[0] @ factors[1]


def rounded(problem: Problem, A: Tensor) -> tuple[Tensor, ref.Scales]:
    """Codes (O, I) and scales of A (O, I), by the recipe's rounding."""
    search = problem.recipe.search_scales and problem.moment is not None
    importance = problem.moment.diagonal().float() if search and problem.moment is not None else None
    return round_weight(A, problem.form, importance, problem.inverse)


def stored(recipe: Recipe, factors: Factors) -> Factors:
    """Factors as they will be stored."""
    form, dtype = recipe.factors, getattr(torch, recipe.factor_dtype)
    l1, l2 = (ref.fake_quantize(f, form) if form else f.to(dtype).float() for f in factors)
    return l1, l2


def weighted(problem: Problem, A: Tensor) -> Factors:
    """The best factors of A (O, I) under the inputs' second moment. Raises UserError without one."""
    if problem.moment is None:
        raise UserError("this recipe weights by the layer's inputs; pass a forward loop for calibration")
    root = problem.root if A.shape[0] > A.shape[1] else None
    return weighted_svd(A, problem.moment, problem.recipe.rank, root)


def refit(problem: Problem, A: Tensor) -> Factors:
    """The best stored factors of A (O, I) under the inputs' second moment; L2 compensates the rounding of L1."""
    l1, _ = stored(problem.recipe, weighted(problem, A))
    thin = l1.double()  # nearly orthonormal, or zero: the normal equations are safe
    l2 = (torch.linalg.pinv(thin.T @ thin, hermitian=True) @ (thin.T @ A.double())).float()
    return l1, stored(problem.recipe, (l1, l2))[1]


def output_error(problem: Problem, factors: Factors, Q: Tensor) -> float:
    """Squared output error with residual Q (O, I) on rounded sample inputs; squared weight error without a sample."""
    l1, l2 = factors
    x, act = problem.rows, problem.recipe.act
    if x is None:
        return float((problem.weight - Q - l1 @ l2).square().sum())
    output = (ref.fake_quantize(x, act) if act else x) @ Q.T + (x @ l2.T) @ l1.T
    return float((output - x @ problem.weight.T).square().sum())


def assemble(linear: nn.Linear, recipe: Recipe, transform: Transform, split: Split) -> SVDLinear:
    """The layer of these tensors; W μ is added to its bias."""
    spec = LinearSpec(
        rank=recipe.rank,
        factors=recipe.factors,
        factor_dtype=recipe.factor_dtype,
        weight=recipe.weight,
        act=recipe.act,
        scaled=transform.scale is not None,
        shifted=transform.shift is not None,
        hadamard=transform.hadamard,
        rank_ratio=recipe.rank_ratio,
    )
    W, bias = linear.weight.detach().float(), bias_of(linear)
    if transform.shift is not None:
        bias = W @ transform.shift + (0 if bias is None else bias)
    layer = SVDLinear(linear.in_features, linear.out_features, bias is not None, spec=spec, device=W.device)
    inputs = {"in_scale": transform.scale, "in_shift": transform.shift, "bias": bias}
    layer.store({name: tensor for name, tensor in inputs.items() if tensor is not None})
    if split.factors and recipe.rank:
        layer.store_factors(*split.factors)
    if split.codes is not None and split.scales is not None:
        layer.store_residual(split.codes, split.scales)
    return layer


def layer_sqnr(linear: nn.Linear, layer: SVDLinear, x: Tensor) -> float | None:
    """10 log10 of signal to noise in the layer's output without bias, for inputs x (M, I); None where one is zero."""
    if not len(x):
        return None
    y, bias = linear(x.to(linear.weight.dtype)).float(), bias_of(linear)
    signal = y if bias is None else y - bias
    sqnr = float(10 * torch.log10(signal.square().sum() / (layer(x).float() - y).square().sum()))
    return sqnr if math.isfinite(sqnr) else None


def relative_error(A: Tensor, B: Tensor) -> float:
    """‖A − B‖ / ‖B‖ for A, B (O, I); 0 where both are zero."""
    return float((A - B).norm() / B.norm().clamp(min=torch.finfo(B.dtype).tiny))


def bias_of(linear: nn.Linear) -> Tensor | None:
    """A float32 copy of the bias (O,), if there is one."""
    bias: Tensor | None = linear.bias
    return None if bias is None else bias.detach().float().clone()
