"""Rounding that minimizes the output error: GPTQ (Frantar et al., arXiv 2210.17323) with scales fixed beforehand.

Columns are rounded in order of descending diag(R); each column's error is spread over the columns not yet rounded so
that the output changes least. With R = I it is rounding to nearest.
"""

from dataclasses import replace

import torch
from torch import Tensor

from svdit.errors import UserError
from svdit.kernels import reference as ref
from svdit.kernels.formats import Format

DAMPING = 0.01
BLOCK = 128


class Inverse:
    """The upper Cholesky factor of R⁻¹ in GPTQ's column order; computed once for several weights.

    `left` is the ratio of GPTQ's squared output error to that of rounding to nearest with the same scales.
    """

    def __init__(self, R: Tensor) -> None:
        """R (I, I) float64. `damping` is what was added to the diagonal, relative to its mean."""
        diagonal = R.diagonal().clone()
        dead = diagonal <= 0  # channels whose rounding does not matter
        step = diagonal.new_ones(()) if dead.all() else diagonal[~dead].mean()
        diagonal[dead] = step
        self.order = diagonal.argsort(descending=True)
        backwards = self.order.flip(0)
        R = R[backwards][:, backwards]
        R.diagonal().copy_(diagonal[backwards])
        L, self.damping = damped_cholesky_(R, DAMPING, step)
        # R backwards is LLᵀ, so R = UUᵀ with U, L turned round, upper triangular, and R⁻¹ = (U⁻¹)ᵀ U⁻¹.
        self.upper = invert_lower_(L).flip(0, 1).float()
        # A column's error e spreads as e U_i / U_ii, which under the damped R costs e² / U_ii²; undamped, less.
        spread = 1 - self.damping * step * self.upper.square().sum(1)
        cost, alive = spread / self.upper.diagonal().square(), ~dead
        self.left = float(cost[alive[self.order]].sum() / diagonal[alive].sum()) if alive.any() else 1.0


def damped_cholesky_(R: Tensor, damping: float, step: Tensor) -> tuple[Tensor, float]:
    """A Cholesky factor of R (I, I) plus `damping · step` on its diagonal, and the damping. Overwrites the diagonal.

    Few samples leave R singular: damping grows tenfold until the factorization succeeds. With the mean diagonal as
    `step` it does so before 100 I, since ‖R‖ ≤ trace R = I · step for any second moment.
    Raises UserError for a matrix that is none.
    """
    diagonal = R.diagonal().clone()
    while damping < 100 * len(R):
        R.diagonal().copy_(diagonal + damping * step)
        L, failed = torch.linalg.cholesky_ex(R)
        if not failed:
            return L, damping
        damping *= 10
    raise UserError("the second moment of a layer's inputs cannot be factorized: it is zero, NaN or Inf")


def invert_lower_(L: Tensor) -> Tensor:
    """Invert a lower triangular matrix (I, I) in place by halves: 1/3 of the work of solving for the identity."""
    size = len(L)
    if size <= BLOCK:
        eye = torch.eye(size, dtype=L.dtype, device=L.device)
        return L.copy_(torch.linalg.solve_triangular(L, eye, upper=False))
    half = size // 2
    first, below, last = L[:half, :half], L[half:, :half], L[half:, half:]
    below.copy_(-invert_lower_(last) @ (below @ invert_lower_(first)))
    return L


def gptq(W: Tensor, inverse: Inverse, values: Tensor, form: Format) -> Tensor:
    """Codes (O, I) of W (O, I) under scale values (O, G)."""
    order, U = inverse.order, inverse.upper
    diagonal, columns = U.diagonal(), W.shape[1]
    # Transposed, so that a column, the unit of work, is contiguous.
    rest = W.T[order].contiguous()
    scales = values.T.repeat_interleave(columns // values.shape[1], dim=0)[order]
    codes = []
    for a in range(0, columns, BLOCK):
        b = min(a + BLOCK, columns)
        block, errors = rest[a:b], W.new_empty(b - a, len(W))
        for i, (column, scale) in enumerate(zip(block, scales[a:b], strict=True)):
            code, rounded = nearest(column, scale, form)
            codes.append(code)
            torch.sub(column, rounded, out=errors[i]).div_(diagonal[a + i])
            block[i + 1 :].addr_(U[a + i, a + i + 1 : b], errors[i], alpha=-1)
        rest[b:].addmm_(U[a:b, b:].T, errors, alpha=-1)
    stacked = torch.stack(codes).index_select(0, order.argsort()).T.contiguous()  # torch 2.8 cannot index FP8 codes
    return stacked.to(torch.uint8 if form.span == "unsigned" else torch.int8) if form.element == "int" else stacked


def nearest(column: Tensor, scale: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Codes (O,) of a column (O,) under scales (O,), and their values (O,). Integer codes stay floats: faster."""
    if form.element == "int":
        code = torch.div(column, scale).round_().clamp_(form.lo, form.hi)
        return code, code * scale
    single = replace(form, group=1)
    code = ref.encode(column, scale, single)
    return code, ref.decode(code, scale, single)
