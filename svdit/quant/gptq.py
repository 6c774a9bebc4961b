"""Rounding that knows the inputs: GPTQ (Frantar et al., arXiv 2210.17323) with scales fixed beforehand.

Columns are rounded in order of falling diag(R); each one's error is spread over the columns still to come so that
the output changes least. With R = I it is rounding to nearest.
"""

from dataclasses import replace

import torch
from torch import Tensor

from svdit.kernels import reference as ref
from svdit.kernels.formats import Format

DAMPING = 0.01
BLOCK = 128


class Inverse:
    """The upper Cholesky factor of R⁻¹ in GPTQ's column order; one serves several weights."""

    def __init__(self, R: Tensor) -> None:
        """R (I, I) float64. `damping` tells what had to be added, as a share of the mean diagonal."""
        R = R.clone()
        diagonal = R.diagonal()
        diagonal[diagonal <= 0] = 1.0  # dead channels: any rounding will do
        self.order = diagonal.argsort(descending=True)
        R = R[self.order][:, self.order]
        self.damping, step = DAMPING, float(R.diagonal().mean())
        while True:
            damped = R.clone()
            damped.diagonal().add_(self.damping * step)
            L, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if not failed:
                break
            self.damping *= 10
        self.upper = lower_inverse(L).flip(0, 1).float()  # R = UUᵀ with U = JLJ upper, so R⁻¹ = (U⁻¹)ᵀ U⁻¹


def lower_inverse(L: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix by halves: a third of the work of solving for the identity."""
    size = len(L)
    if size <= BLOCK:
        return torch.linalg.solve_triangular(L, torch.eye(size, dtype=L.dtype, device=L.device), upper=False)
    half, inverse = size // 2, torch.zeros_like(L)
    inverse[:half, :half] = lower_inverse(L[:half, :half])
    inverse[half:, half:] = lower_inverse(L[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (L[half:, :half] @ inverse[:half, :half])
    return inverse


def gptq(W: Tensor, inverse: Inverse, values: Tensor, form: Format) -> Tensor:
    """Codes (O, I) of W (O, I) under scale values (O, G)."""
    order, U = inverse.order, inverse.upper
    columns = W.shape[1]
    # Columns lie as contiguous rows here: one is touched at a time.
    rest = W.T[order].contiguous()
    scales = values.T.repeat_interleave(columns // values.shape[1], dim=0)[order]
    steps = U.diagonal().tolist()
    codes = []
    for a in range(0, columns, BLOCK):
        b = min(a + BLOCK, columns)
        block, errors = rest[a:b], torch.empty(b - a, len(W), device=W.device)
        for i, (column, scale) in enumerate(zip(block, scales[a:b], strict=True)):
            code, rounded = nearest(column, scale, form)
            codes.append(code)
            torch.sub(column, rounded, out=errors[i]).div_(steps[a + i])
            block[i + 1 :].addr_(U[a + i, a + i + 1 : b], errors[i], alpha=-1)
        rest[b:].addmm_(U[a:b, b:].T, errors, alpha=-1)
    found = torch.stack(codes)[order.argsort()].T.contiguous()
    return found.to(torch.uint8 if form.span == "unsigned" else torch.int8) if form.element == "int" else found


def nearest(column: Tensor, scale: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Codes (O,) of a column under scales (O,), and what they stand for. Integers stay floats: columns are many."""
    if form.element == "int":
        code = torch.div(column, scale).round_().clamp_(form.lo, form.hi)
        return code, code * scale
    single = replace(form, group=1)
    code = ref.encode(column, scale, single)
    return code, ref.decode(code, scale, single)
