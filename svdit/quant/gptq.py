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
    # Columns lie as contiguous rows here: one is touched at a time.
    rest = W.T[order].contiguous()
    scales = values.T.repeat_interleave(columns // values.shape[1], dim=0)[order]
    single = replace(form, group=1)  # a column is a row of groups of one
    codes = []
    for a in range(0, columns, BLOCK):
        b = min(a + BLOCK, columns)
        block, errors = rest[a:b], torch.empty(b - a, len(W), device=W.device)
        for i in range(b - a):
            code = ref.encode(block[i], scales[a + i], single)
            codes.append(code)
            errors[i] = (block[i] - ref.decode(code, scales[a + i], single)) / U[a + i, a + i]
            block[i + 1 :].addr_(U[a + i, a + i + 1 : b], errors[i], alpha=-1)
        rest[b:].addmm_(U[a:b, b:].T, errors, alpha=-1)
    return torch.stack(codes)[order.argsort()].T.contiguous()
