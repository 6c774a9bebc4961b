"""The definition of every quantized operation, in plain torch, on any device.

Faster backends compute the same codes bit for bit. Rows are along the last dimension; K columns, G groups of g.
Rounding is half to even, as torch.round does.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from svdit.kernels.formats import ELEMENT_MAX, TWO_LEVEL, Format
from svdit.kernels.layer import SCALE_DTYPES as SCALE_DTYPES
from svdit.kernels.layer import Layer

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the magnitudes of FP4; code c stands for sign(c) · E2M1[|c|]


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
        """(…, G) fp32: scales times zero points; None without zero points."""
        return None if self.zeros is None else self.values() * self.zeros

    def shifted(self, x: Tensor, times: int = 1) -> Tensor:
        """x (…, K) plus `times` the offsets: with 1, what is rounded to codes."""
        offsets = self.offsets()
        if offsets is None:
            return x
        return x + times * offsets.repeat_interleave(x.shape[-1] // offsets.shape[-1], dim=-1)


def grouped(x: Tensor, form: Format) -> Tensor:
    """(…, K) to (…, G, g)"""
    return x.reshape(*x.shape[:-1], form.groups(x.shape[-1]), -1)


def ideal_scales(x: Tensor, form: Format) -> Tensor:
    """(…, G) fp32: the scale that maps each group's largest magnitude to the largest code, for x (…, K)."""
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
    """Round scales (…, G) to the stored type. Zero scales (all-zero groups) become one; codes are zero then.

    With one step for all groups of a row they become the largest of the row, which changes no other.
    """
    if form.scale in TWO_LEVEL:
        absmax = ideal.abs().amax(-1, keepdim=True)
        absmax = torch.where(absmax == 0, 1.0, absmax)
        steps = absmax / TWO_LEVEL[form.scale]
        multiples = torch.where(ideal == 0, absmax, ideal) / steps
        if form.scale == "int8":
            multiples = torch.copysign(multiples.abs().round().clamp(min=1), multiples)
        else:
            multiples = multiples.clamp(min=2.0**-9)  # the smallest E4M3 number above zero
        return Scales(multiples.to(SCALE_DTYPES[form.scale]), steps)
    ideal = torch.where(ideal == 0, 1.0, ideal)
    if form.scale == "e8m0":  # OCP MX: the exponent of the absmax less that of the largest element
        largest = ELEMENT_MAX[form.element]
        exponent = torch.floor(torch.log2(ideal * largest)) - math.floor(math.log2(largest))
        return Scales(torch.exp2(exponent).to(torch.float8_e8m0fnu))
    return Scales(ideal.to(SCALE_DTYPES[form.scale]))


def zero_points(x: Tensor, ideal: Tensor, form: Format) -> Tensor:
    """(…, G) int8: the codes of zero that map the minima of x (…, K) in groups to the smallest code."""
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
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(E2M1)], dtype=torch.float32, device=ratio.device)
    magnitude = ratio.abs()
    low = torch.bucketize(magnitude, middles)
    high = torch.bucketize(magnitude, middles, right=True)
    even = torch.where(low % 2 == 0, low, high)  # low and high differ only at ties
    return torch.where(ratio < 0, -even, even).to(torch.int8)


def decode(codes: Tensor, values: Tensor, form: Format) -> Tensor:
    """fp32 (…, K) from codes (…, K) and scale values (…, G)."""
    if form.element == "e2m1":
        magnitudes = torch.tensor(E2M1, dtype=torch.float32, device=codes.device)
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
    """fp32 (…, K) from codes (…, K): the inverse of `quantize` except for its rounding."""
    return scales.shifted(decode(codes, scales.values(), form), -1)


def fake_quantize(x: Tensor, form: Format) -> Tensor:
    """x (…, K), quantized and dequantized, fp32."""
    return dequantize(*quantize(x, form), form)


def pack(codes: Tensor, form: Format) -> Tensor:
    """Codes (…, K) to bytes (…, ⌈K·bits/8⌉), lowest bits first; 8-bit codes are stored as they are.

    Signed codes are offset by 2^(bits−1), which makes them non-negative.
    """
    if form.bits == 8:
        return codes
    zero = _offset(form)
    if form.bits == 4 and codes.shape[-1] % 2 == 0:
        nibbles = codes.view(torch.uint8) + zero & 15
        return nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    planes = torch.arange(form.bits, device=codes.device)
    bits = (codes.to(torch.int16) + zero).unsqueeze(-1) >> planes & 1
    bits = bits.flatten(-2).to(torch.uint8)
    bits = F.pad(bits, (0, -bits.shape[-1] % 8)).reshape(*codes.shape[:-1], -1, 8)
    return (bits << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, form: Format, columns: int) -> Tensor:
    """The inverse of `pack`: codes (…, columns), int8, uint8 when unsigned, float8 for E4M3."""
    if form.bits == 8:
        return packed
    zero, dtype = _offset(form), torch.uint8 if form.span == "unsigned" else torch.int8
    if form.bits == 4 and columns % 2 == 0:
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(dtype) - zero
    bits = (packed.unsqueeze(-1) >> torch.arange(8, device=packed.device, dtype=torch.uint8) & 1).flatten(-2)
    bits = bits[..., : columns * form.bits].reshape(*packed.shape[:-1], columns, form.bits).to(torch.int16)
    codes = (bits << torch.arange(form.bits, device=packed.device)).sum(-1)
    return (codes - zero).to(dtype)


def _offset(form: Format) -> int:
    return 0 if form.span == "unsigned" else 2 ** (form.bits - 1)


def hadamard_matrix(size: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The symmetric orthogonal Hadamard matrix (size, size) of Sylvester's construction; size a power of two."""
    H = torch.ones(1, 1, device=device, dtype=dtype)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H / math.sqrt(size)


def rotate(x: Tensor, block: int) -> Tensor:
    """x (…, K) times the block-diagonal Hadamard matrix; its own inverse. `block` 0: x unchanged.

    Sums and differences of neighbors at distance 1, 2, 4 … in turn: the order is part of the definition, so that
    codes of the result are the same everywhere.
    """
    if not block:
        return x
    rows = x.reshape(-1, block)
    for _ in range(block.bit_length() - 1):
        a, b = rows[:, 0::2], rows[:, 1::2]
        rows = torch.cat([a + b, a - b], dim=1)
    return (rows * (1 / math.sqrt(block))).view(x.shape)


def encoded(name: str, codes: Tensor, scales: Scales, form: Format) -> dict[str, Tensor]:
    """A layer's tensors for codes (O, K) and scales of its matrix `name`: residual, l1 or l2."""
    parts = {"codes": pack(codes, form), "scales": scales.groups, "steps": scales.steps, "zeros": scales.zeros}
    return {f"{name}_{part}": tensor.contiguous() for part, tensor in parts.items() if tensor is not None}


def layer_scales(layer: Layer, name: str = "residual") -> Scales:
    """Stored scales of a quantized matrix."""
    parts = (layer.tensors.get(f"{name}_{part}") for part in ("steps", "zeros"))
    return Scales(layer.tensors[f"{name}_scales"], *parts)


def layer_codes(layer: Layer, name: str = "residual") -> Tensor:
    """Codes (O, K) of a quantized matrix: int8, uint8 when unsigned, float8 for E4M3."""
    return unpack(layer.tensors[f"{name}_codes"], layer.form(name), layer.columns(name))


def matrix(layer: Layer, name: str = "residual") -> Tensor:
    """The residual (O, I), l1 (O, R) or l2 (R, I), decoded to fp32."""
    if name in layer.tensors:
        return layer.tensors[name].float()
    return dequantize(layer_codes(layer, name), layer_scales(layer, name), layer.form(name))


def transform(layer: Layer, x: Tensor) -> Tensor:
    """x (…, I) to x̂ (…, I) = ((x − shift) / scale) H, fp32."""
    x = x.float()
    x = x if layer.in_shift is None else x - layer.in_shift
    x = x if layer.in_scale is None else x * layer.in_scale.reciprocal()  # as every backend does: equal codes
    return rotate(x, layer.spec.hadamard)


def linear(layer: Layer, x: Tensor, product: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """y = Qa(x̂) Wᵀ + (x̂ L2ᵀ) L1ᵀ + b for x (…, I): (…, O), fp32.

    `product`, x̂ (…, I) to (…, O), computes Qa(x̂) Wᵀ + b in another way than from decoded weights.
    """
    spec, hat = layer.spec, transform(layer, x)
    terms: list[Tensor] = []
    if product is not None:
        terms.append(product(hat))
    elif spec.weight is not None:
        terms.append(F.linear(fake_quantize(hat, spec.act) if spec.act else hat, matrix(layer)))
    if spec.rank:
        terms.append(F.linear(F.linear(hat, matrix(layer, "l2")), matrix(layer, "l1")))
    if layer.bias is not None and product is None:
        terms.append(layer.bias)
    y, *rest = terms
    for term in rest:
        y = y + term
    return y
