"""The definition of every quantized operation, in plain torch, on any device.

Faster backends compute the same codes bit for bit. Rows lie along the last dimension; K columns, G groups of g.
Rounding is half to even, as torch.round does.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from svdit.kernels.formats import ELEMENT_MAX, TWO_LEVEL, Format

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the magnitudes of FP4; code c stands for sign(c) · E2M1[|c|]
SCALE_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "e4m3": torch.float8_e4m3fn,
    "e8m0": torch.float8_e8m0fnu,
}


class Scales(NamedTuple):
    """As stored: `groups` (…, G) in the format's type; `steps` (…, 1) fp32, where there are two levels; `zeros`
    (…, G) int8, where the format is affine."""

    groups: Tensor
    steps: Tensor | None = None
    zeros: Tensor | None = None

    def values(self) -> Tensor:
        """(…, G) fp32"""
        values = self.groups.float()
        return values if self.steps is None else values * self.steps

    def offsets(self) -> Tensor | None:
        """(…, G) fp32: x is what the codes stand for, less this; None without zero points."""
        return None if self.zeros is None else self.values() * self.zeros

    def shifted(self, x: Tensor, times: int = 1) -> Tensor:
        """x (…, K) with so many times the offsets added: with one, what is rounded to codes."""
        offsets = self.offsets()
        if offsets is None:
            return x
        return x + times * offsets.repeat_interleave(x.shape[-1] // offsets.shape[-1], dim=-1)


def grouped(x: Tensor, form: Format) -> Tensor:
    """(…, K) to (…, G, g)"""
    return x.reshape(*x.shape[:-1], form.groups(x.shape[-1]), -1)


def ideal_scales(x: Tensor, form: Format) -> Tensor:
    """(…, G) fp32: the scale that brings each group's largest magnitude onto the largest code."""
    x = grouped(x, form)
    if form.span == "unsigned":
        return x.amax(-1) / form.hi
    if form.span == "affine":
        return (x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)) / (form.hi - form.lo)
    if form.span == "symmetric":
        return x.abs().amax(-1) / (ELEMENT_MAX.get(form.element) or form.hi)
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return largest / form.lo


def store_scales(ideal: Tensor, form: Format) -> Scales:
    """Round scales (…, G) to the stored type. Zero scales (all-zero groups) become one; codes are zero then."""
    ideal = torch.where(ideal == 0, torch.ones_like(ideal), ideal)
    if form.scale in TWO_LEVEL:
        steps = ideal.abs().amax(-1, keepdim=True) / TWO_LEVEL[form.scale]
        multiples = ideal / steps
        if form.scale == "int8":
            multiples = torch.copysign(multiples.abs().round().clamp(min=1), multiples)
        else:
            multiples = multiples.clamp(min=2.0**-9)  # the smallest E4M3 number above zero
        return Scales(multiples.to(SCALE_DTYPES[form.scale]), steps)
    if form.scale == "e8m0":  # the power of two at or below, so that the largest element is within reach (OCP MX)
        return Scales(
            torch.exp2(torch.floor(torch.log2(ideal * ELEMENT_MAX[form.element])) - 2).to(torch.float8_e8m0fnu)
        )
    return Scales(ideal.to(SCALE_DTYPES[form.scale]))


def zero_points(x: Tensor, ideal: Tensor, form: Format) -> Tensor:
    """(…, G) int8: the codes of zero that bring the groups' smallest elements onto the smallest code."""
    low = grouped(x, form).amin(-1).clamp(max=0)
    return (form.lo - low / torch.where(ideal == 0, 1.0, ideal)).round().clamp(form.lo, form.hi).to(torch.int8)


def encode(x: Tensor, values: Tensor, form: Format) -> Tensor:
    """Codes (…, K) of x under scale values (…, G): int8, or float8 numbers for E4M3; uint8 when unsigned."""
    ratio = (grouped(x, form) / values.unsqueeze(-1)).flatten(-2)
    if form.element == "e4m3":
        return ratio.clamp(-448, 448).to(torch.float8_e4m3fn)
    if form.element == "e2m1":
        return _nearest_e2m1(ratio)
    codes = ratio.round().clamp(form.lo, form.hi)
    return codes.to(torch.uint8 if form.span == "unsigned" else torch.int8)


def _nearest_e2m1(ratio: Tensor) -> Tensor:
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(E2M1)], device=ratio.device)
    magnitude = ratio.abs()
    low = torch.bucketize(magnitude, middles)
    high = torch.bucketize(magnitude, middles, right=True)
    even = torch.where(low % 2 == 0, low, high)  # they differ only at ties
    return torch.where(ratio < 0, -even, even).to(torch.int8)


def decode(codes: Tensor, values: Tensor, form: Format) -> Tensor:
    """fp32 (…, K) from codes (…, K) and scale values (…, G)."""
    if form.element == "e2m1":
        magnitudes = torch.tensor(E2M1, device=codes.device)
        numbers = magnitudes[codes.abs().long()].copysign(codes.float())
    else:
        numbers = codes.float()
    return (grouped(numbers, form) * values.unsqueeze(-1)).flatten(-2)


def quantize(x: Tensor, form: Format) -> tuple[Tensor, Scales]:
    """Codes and scales of x (…, K), round to nearest under the ideal scales as stored."""
    ideal = ideal_scales(x, form)
    scales = store_scales(ideal, form)
    if form.span == "affine":
        scales = scales._replace(zeros=zero_points(x, ideal, form))
    return encode(scales.shifted(x), scales.values(), form), scales


def dequantize(codes: Tensor, scales: Scales, form: Format) -> Tensor:
    """The inverse of `quantize`, but for its rounding: fp32 (…, K)."""
    return scales.shifted(decode(codes, scales.values(), form), -1)


def fake_quantize(x: Tensor, form: Format) -> Tensor:
    """x (…, K) as it is after quantization, fp32."""
    return dequantize(*quantize(x, form), form)


def pack(codes: Tensor, form: Format) -> Tensor:
    """Codes (…, K) to bytes (…, ⌈K·bits/8⌉), lowest bits first, offset to be unsigned; 8-bit codes stay as they are."""
    if form.bits == 8:
        return codes
    if form.bits == 4 and codes.shape[-1] % 2 == 0:
        offset = codes.view(torch.uint8) + 8 & 15
        return offset[..., 0::2] | offset[..., 1::2] << 4
    offset = codes.to(torch.int16) + 2 ** (form.bits - 1)
    planes = torch.arange(form.bits, device=codes.device)
    bits = (offset.unsqueeze(-1) >> planes & 1).flatten(-2).to(torch.uint8)
    bits = F.pad(bits, (0, -bits.shape[-1] % 8)).reshape(*codes.shape[:-1], -1, 8)
    return (bits << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, form: Format, columns: int) -> Tensor:
    """The inverse of `pack`: int8 codes (…, columns)."""
    if form.bits == 8:
        return packed
    if form.bits == 4 and columns % 2 == 0:
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(torch.int8) - 8
    bits = (packed.unsqueeze(-1) >> torch.arange(8, device=packed.device, dtype=torch.uint8) & 1).flatten(-2)
    bits = bits[..., : columns * form.bits].reshape(*packed.shape[:-1], columns, form.bits).to(torch.int16)
    codes = (bits << torch.arange(form.bits, device=packed.device)).sum(-1)
    return (codes - 2 ** (form.bits - 1)).to(torch.int8)


def hadamard_matrix(size: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The symmetric orthogonal Hadamard matrix (size, size) of Sylvester's construction; size a power of two."""
    H = torch.ones(1, 1, device=device, dtype=dtype)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H / math.sqrt(size)


def rotate(x: Tensor, block: int) -> Tensor:
    """x (…, K) times the block-diagonal Hadamard matrix; its own inverse. `block` 0 changes nothing.

    Sums and differences of neighbours at distance 1, 2, 4 … in turn: the order is part of the definition, so that
    codes of what comes out are the same everywhere.
    """
    if not block:
        return x
    rows = x.reshape(-1, block)
    for _ in range(block.bit_length() - 1):
        a, b = rows[:, 0::2], rows[:, 1::2]
        rows = torch.cat([a + b, a - b], dim=1)
    return (rows * (1 / math.sqrt(block))).view(x.shape)
