"""Rounding that knows the inputs: GPTQ (Frantar et al., arXiv 2210.17323) with scales fixed beforehand.

Columns are rounded in order of falling diag(R); each one's error is spread over the columns still to come so that
the output changes least. With R = I it is rounding to nearest.
"""

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
            L, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if not failed:
                break
            self.damping *= 10
        self.upper = upper.float()


def gptq(W: Tensor, inverse: Inverse, values: Tensor, form: Format) -> Tensor:
    """Codes (O, I) of W (O, I) under scale values (O, G)."""
    order, U = inverse.order, inverse.upper
    columns = W.shape[1]
    scales = values.repeat_interleave(columns // values.shape[1], dim=1)[:, order]
    W = W[:, order].clone()
    one = Format(form.bits, 0, form.scale, form.span, form.element)  # a column is a row group of one
    codes = torch.empty(W.shape, dtype=ref.encode(W[:, :1], scales[:, :1], one).dtype, device=W.device)
    for a in range(0, columns, BLOCK):
        b = min(a + BLOCK, columns)
        block, errors = W[:, a:b], torch.empty(len(W), b - a, device=W.device)
        for i in range(b - a):
            column, scale = block[:, i : i + 1], scales[:, a + i : a + i + 1]
            code = ref.encode(column, scale, one)
            codes[:, a + i : a + i + 1] = code
            errors[:, i : i + 1] = (column - ref.decode(code, scale, one)) / U[a + i, a + i]
            block[:, i + 1 :] -= errors[:, i : i + 1] * U[a + i, a + i + 1 : b]
        W[:, b:] -= errors @ U[a:b, b:]
    return codes[:, order.argsort()]
