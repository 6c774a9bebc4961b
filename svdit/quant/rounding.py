"""Weights to codes: scales from the absmax or by the least weighted squared error, then rounding."""

import torch
from torch import Tensor

from svdit.kernels import reference as ref
from svdit.kernels.formats import Format
from svdit.quant.gptq import Inverse, gptq

RATIOS = torch.linspace(0.6, 1.0, 9, device="cpu").tolist()
ROWS = 64  # searched together, to fit the cache


def weight_scales(W: Tensor, form: Format, importance: Tensor | None) -> ref.Scales:
    """Scales (O, G) for W (O, I), from the absmax; with `importance` (I,) and fewer than 8 bits, by search.

    `importance` is the mean square of each input. Tried are nine ratios from 0.6 to 1.0 of the scale that just avoids
    clipping, and both signs where the span is full; the one with the least weighted squared error is kept.
    """
    ideal = ref.ideal_scales(W, form)
    zeros = ref.zero_points(W, ideal, form) if form.span == "affine" else None
    if importance is None or form.element != "int" or form.bits == 8:
        return ref.store_scales(ideal, form)._replace(zeros=zeros)
    if form.span == "full":
        ideal = ideal * (form.lo / (form.lo + 0.5))  # the mean of both ends of the range
    best = torch.empty_like(ideal)
    for i in range(0, len(W), ROWS):
        rows = slice(i, i + ROWS)
        best[rows] = _searched(W[rows], ideal[rows], None if zeros is None else zeros[rows], form, importance)
    return ref.store_scales(best, form)._replace(zeros=zeros)


def _searched(W: Tensor, ideal: Tensor, zeros: Tensor | None, form: Format, importance: Tensor) -> Tensor:
    """The best of the tried scales (O, G) for a few rows of W (O, I); zero where `ideal` is."""
    best, least = ideal, torch.full_like(ideal, torch.inf)
    for sign in (1.0, -1.0) if form.span == "full" else (1.0,):
        for ratio in RATIOS:
            scales = ref.Scales(torch.where(ideal == 0, 1.0, ideal * (sign * ratio)), zeros=zeros)
            shifted = scales.shifted(W)
            codes = ref.encode(shifted, scales.groups, form)
            error = (ref.decode(codes, scales.groups, form) - shifted).square_().mul_(importance)
            error = ref.grouped(error, form).sum(-1)
            best, least = torch.where(error < least, scales.groups, best), torch.minimum(error, least)
    return torch.where(ideal == 0, 0.0, best)


def round_weight(
    W: Tensor, form: Format, importance: Tensor | None = None, inverse: Inverse | None = None
) -> tuple[Tensor, ref.Scales]:
    """Codes (O, I) and scales of W (O, I); by GPTQ with an `inverse`, else to nearest."""
    scales = weight_scales(W, form, importance)
    W, values = scales.shifted(W), scales.values()
    return (gptq(W, inverse, values, form) if inverse else ref.encode(W, values, form)), scales
