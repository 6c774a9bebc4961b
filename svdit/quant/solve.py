"""One layer, as in SVDQuant's figure: transform, split off the low rank, round the residual, replace.

    Ŵ = L1 L2 + Res,    Y ≈ Qa(x̂) Q(Res)ᵀ + (x̂ L2ᵀ) L1ᵀ + b̂        (arXiv 2411.05007)

The residual is always that of the factors as stored.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from svdit.errors import UserError
from svdit.kernels import reference as ref
from svdit.kernels.formats import Format
from svdit.quant.config import Recipe
from svdit.quant.gptq import DAMPING, Inverse
from svdit.quant.linear import LinearSpec, SVDLinear, rank_for_ratio
from svdit.quant.lowrank import Factors, truncated_svd, weighted_svd
from svdit.quant.observe import Statistics
from svdit.quant.rounding import round_weight
from svdit.quant.transforms import Transform, choose_transform


@dataclass(frozen=True)
class LayerReport:
    """What was done to a layer and what it cost. `sqnr` in dB, of the layer's output on inputs not used to choose."""

    name: str
    weight: str
    act: str
    rank: int
    numbers_before: int  # in the weight
    numbers_after: int  # in the residual and the factors
    residual: bool
    bytes_before: int
    bytes_after: int
    sqnr: float | None
    weight_error: float  # ‖W − W'‖ / ‖W‖
    alpha: float
    beta: float
    note: str = ""


class Split(NamedTuple):
    """Factors as stored, and the residual's codes and scales; either may be missing."""

    factors: Factors | None
    codes: Tensor | None = None
    scales: ref.Scales | None = None


@torch.no_grad()
def quantize_linear(
    name: str, linear: nn.Linear, recipe: Recipe, statistics: Statistics | None
) -> tuple[SVDLinear, LayerReport]:
    """The quantized layer and its report."""
    W = linear.weight.detach().float()
    recipe = fit(recipe, W)
    transform, (alpha, beta) = Transform(None, None, recipe.hadamard), (0.0, 0.0)
    if statistics and (recipe.centre or recipe.shift or recipe.smoothing):
        transform, (alpha, beta) = choose_transform(W, statistics, recipe)
    solver = Solver(transform.weight(W), recipe, transform, statistics)
    layer = assemble(linear, recipe, transform, solver.split())
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
        sqnr=layer_sqnr(linear, layer, statistics.reporting) if statistics else None,
        weight_error=float((layer.effective_weight() - W).norm() / W.norm()),
        alpha=alpha,
        beta=beta,
        note=solver.note,
    )
    return layer, report


def fit(recipe: Recipe, W: Tensor) -> Recipe:
    """The recipe with what the layer's shape decides: its rank, and a Hadamard block that divides its width."""
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
    return replace(recipe, rank=rank, hadamard=block if block > 1 else 0)


class Solver:
    """Splits Ŵ (O, I) into factors and codes by one of the recipes' ways."""

    def __init__(self, W: Tensor, recipe: Recipe, transform: Transform, statistics: Statistics | None) -> None:
        self.W, self.recipe, self.note = W, recipe, ""
        self.R: Tensor | None = None
        self.root: Tensor | None = None
        self.inverse: Inverse | None = None
        self.inputs: Tensor | None = None
        if statistics is None or not recipe.needs_inputs:
            return
        self.R = transform.second_moment(statistics)
        self.inputs = transform.inputs(statistics.choosing)
        if recipe.rounding == "gptq":
            self.inverse = Inverse(self.R)
            if self.inverse.damping > DAMPING:
                self.note = f"GPTQ needed damping {self.inverse.damping:g}"

    def split(self) -> Split:
        """By `recipe.low_rank`."""
        recipe = self.recipe
        if recipe.low_rank == "factors":
            return Split(self.stored(self.weighted(self.W) if recipe.whiten else balanced(self.W, recipe.rank)))
        if not recipe.rank:
            return Split(None, *self.rounded(self.W))
        if recipe.low_rank == "iterated":
            return self.iterated()
        if recipe.low_rank == "correction":
            codes, scales = self.rounded(self.W)
            return Split(self.refitted(self.W - self.decoded(codes, scales)), codes, scales)
        return self.alternated(recipe.iterations if recipe.low_rank == "alternated" else 0)

    def iterated(self) -> Split:
        """SVDQuant as published: SVD of what rounding to nearest left, until the output error first grows."""
        best, least, Q = None, torch.inf, torch.zeros_like(self.W)
        for _ in range(self.recipe.iterations):
            factors = self.stored(truncated_svd(self.W - Q, self.recipe.rank))
            codes, scales = round_weight(self.W - factors[0] @ factors[1], self.form)
            Q = self.decoded(codes, scales)
            error = self.error(factors, Q)
            if error > least:
                break
            best, least = Split(factors, codes, scales), error
        assert best is not None and best.factors is not None
        if self.inverse:
            return Split(best.factors, *self.rounded(self.W - best.factors[0] @ best.factors[1]))
        return best

    def alternated(self, refits: int) -> Split:
        """From the plain SVD: round the residual, refit the factors to what is left under R; keep the best."""
        factors = self.stored(truncated_svd(self.W, self.recipe.rank))
        best, least = None, torch.inf
        for _ in range(max(1, refits)):
            codes, scales = self.rounded(self.W - factors[0] @ factors[1])
            Q = self.decoded(codes, scales)
            if refits:
                factors = self.refitted(self.W - Q)
            error = self.error(factors, Q)
            if error < least:
                best, least = Split(factors, codes, scales), error
        assert best is not None
        return best

    def refitted(self, A: Tensor) -> Factors:
        """The best stored factors of A under the inputs' second moment; L2 makes up for the rounding of L1."""
        l1, _ = self.stored(self.weighted(A))
        thin = l1.double()  # nearly orthonormal, or zero: the normal equations are safe
        l2 = (torch.linalg.pinv(thin.T @ thin, hermitian=True) @ (thin.T @ A.double())).float()
        return l1, self.stored((l1, l2))[1]

    def rounded(self, residual: Tensor) -> tuple[Tensor, ref.Scales]:
        search = self.recipe.search_scales and self.R is not None
        importance = self.R.diagonal().float() if search and self.R is not None else None
        return round_weight(residual, self.form, importance, self.inverse)

    def decoded(self, codes: Tensor, scales: ref.Scales) -> Tensor:
        return ref.dequantize(codes, scales, self.form)

    @property
    def form(self) -> Format:
        assert self.recipe.weight is not None, "a recipe with a residual has a weight format"
        return self.recipe.weight

    def weighted(self, A: Tensor) -> Factors:
        """The best factors of A under the inputs' second moment."""
        if self.R is None:
            raise UserError("this recipe weighs by the layer's inputs; give a forward loop for calibration")
        if self.root is None and A.shape[0] > A.shape[1]:
            self.root = cholesky(self.R)
        return weighted_svd(A, self.R, self.recipe.rank, self.root)

    def stored(self, factors: Factors) -> Factors:
        """Factors as they will be stored."""
        form, dtype = self.recipe.factors, getattr(torch, self.recipe.factor_dtype)
        l1, l2 = (ref.fake_quantize(f, form) if form else f.to(dtype).float() for f in factors)
        return l1, l2

    def error(self, factors: Factors, Q: Tensor) -> float:
        """Squared output error on the sample, activations rounded; without a sample, squared weight error."""
        l1, l2 = factors
        if self.inputs is None:
            return float((self.W - Q - l1 @ l2).square().sum())
        rounded = ref.fake_quantize(self.inputs, self.recipe.act) if self.recipe.act else self.inputs
        output = rounded @ Q.T + (self.inputs @ l2.T) @ l1.T
        return float((output - self.inputs @ self.W.T).square().sum())


def cholesky(R: Tensor) -> Tensor:
    """A Cholesky factor of R, damped as little as it needs: few samples leave it singular."""
    damping, step, failed = 1e-6, R.diagonal().mean(), True
    while failed:
        damped = R.clone()
        damped.diagonal().add_(damping * step)
        root, info = torch.linalg.cholesky_ex(damped)
        damping, failed = 10 * damping, bool(info)
    return root


def balanced(W: Tensor, rank: int) -> Factors:
    """The truncated SVD with √S on either side, so that both factors round equally well."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    root = S[:rank].sqrt()
    return (U[:, :rank] * root).float(), (root[:, None] * Vh[:rank]).float()


def assemble(linear: nn.Linear, recipe: Recipe, transform: Transform, split: Split) -> SVDLinear:
    """The layer that holds it all; its bias takes up W μ."""
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
    layer.in_scale, layer.in_shift = transform.scale, transform.shift
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    if split.factors and recipe.rank:
        layer.store_factors(*split.factors)
    if split.codes is not None and split.scales is not None:
        layer.store_residual(split.codes, split.scales)
    return layer


def layer_sqnr(linear: nn.Linear, layer: SVDLinear, x: Tensor) -> float:
    """10 log10 of signal to noise in the layer's output (its bias aside) for inputs x (M, I)."""
    y, bias = linear(x.to(linear.weight.dtype)).float(), bias_of(linear)
    signal = y if bias is None else y - bias
    return float(10 * torch.log10(signal.square().sum() / (layer(x).float() - y).square().sum()))


def bias_of(linear: nn.Linear) -> Tensor | None:
    """A float32 copy of the bias, if there is one."""
    bias: Tensor | None = linear.bias
    return None if bias is None else bias.detach().float().clone()
