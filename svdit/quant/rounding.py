"""Weights to codes: scales chosen by largest magnitude or by weighted squared error, then rounding."""

import torch
from torch import Tensor

from svdit.kernels import reference as ref
from svdit.kernels.formats import Format
from svdit.quant.gptq import Inverse, gptq

RATIOS = torch.linspace(0.6, 1.0, 9).tolist()
ROWS = 64  # searched together: what fits a processor's cache


def weight_scales(W: Tensor, form: Format, importance: Tensor | None) -> ref.Scales:
    """Scales for W (O, I). With `importance` (I,), the mean square of each input, and fewer than 8 bits, those of
    least weighted error: nine sizes from 0.6 to 1.0 of what just avoids clipping; both signs where the span is full.
    """
    ideal = ref.ideal_scales(W, form)
    if importance is None or form.element != "int" or form.bits == 8:
        return ref.store_scales(ideal, form)
    if form.span == "full":
        ideal = ideal * (form.lo / (form.lo + 0.5))  # the middle between the two ends of the range
    best = torch.cat(
        [_searched(w, i, form, importance) for w, i in zip(torch.split(W, ROWS), torch.split(ideal, ROWS), strict=True)]
    )
    return ref.store_scales(best, form)


def _searched(W: Tensor, ideal: Tensor, form: Format, importance: Tensor) -> Tensor:
    """The best of the tried scales (O, G) for a few rows of W."""
    best, least = ideal, torch.full_like(ideal, torch.inf)
    for sign in (1.0, -1.0) if form.span == "full" else (1.0,):
        for ratio in RATIOS:
            values = torch.where(ideal == 0, 1.0, ideal * (sign * ratio))
            error = (ref.decode(ref.encode(W, values, form), values, form) - W).square_().mul_(importance)
            error = ref.grouped(error, form).sum(-1)
            best, least = torch.where(error < least, values, best), torch.minimum(error, least)
    return best


def round_weight(
    W: Tensor, form: Format, importance: Tensor | None = None, inverse: Inverse | None = None
) -> tuple[Tensor, ref.Scales]:
    """Codes (O, I) and scales of W; GPTQ where `inverse` is given, else to nearest."""
    scales = weight_scales(W, form, importance)
    values = scales.values()
    return (gptq(W, inverse, values, form) if inverse else ref.encode(W, values, form)), scales
