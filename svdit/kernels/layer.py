"""What every backend packs and computes: a quantized linear as stored, and a call with what is fused around it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from svdit.kernels import reference as ref
from svdit.kernels.formats import Format


class Modulation(NamedTuple):
    """LayerNorm comes first, then x · (1 + scale) + shift; (N, I) each."""

    shift: Tensor
    scale: Tensor


class Residual(NamedTuple):
    """x (N, T, O) becomes x + gate · y in place; gate (N, O)."""

    x: Tensor
    gate: Tensor


@dataclass(frozen=True)
class Layer:
    """A quantized linear: y = Qa(x̂) Wᵀ + (x̂ L2ᵀ) L1ᵀ + bias, x̂ = ((x − shift) · (1/scale)) H."""

    stored: Tensor  # (O, bytes) as reference.pack gives codes (O, I)
    columns: int  # I
    scales: ref.Scales
    weight: Format
    act: Format | None = None
    bias: Tensor | None = None  # (O,)
    in_shift: Tensor | None = None  # (I,)
    in_scale: Tensor | None = None  # (I,)
    hadamard: int = 0
    l1: Tensor | None = None  # (O, R), float32 or bfloat16
    l2: Tensor | None = None  # (R, I)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""
        return len(self.stored), self.columns

    def codes(self) -> Tensor:
        """(O, I) int8, or float8 for E4M3"""
        return ref.unpack(self.stored, self.weight, self.columns)

    def with_whole_codes(self) -> "Layer":
        """The same with integer codes of 2 and 3 bits kept in 4, of 5 to 7 in 8."""
        form = self.weight
        bits = 4 if form.bits <= 4 else 8
        if form.element != "int" or form.bits == bits:
            return self
        codes = self.codes()
        form = replace(form, bits=bits)
        return replace(self, stored=ref.pack(codes, form), weight=form)

    def transform(self, x: Tensor) -> Tensor:
        """x̂, fp32"""
        x = x.float()
        x = x if self.in_shift is None else x - self.in_shift
        x = x if self.in_scale is None else x * self.in_scale.reciprocal()
        return ref.rotate(x, self.hadamard)

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """L1 and L2, where there is a branch."""
        return None if self.l1 is None or self.l2 is None else (self.l1, self.l2)

    def completed(self, y: Tensor, hat: Tensor) -> Tensor:
        """The product of the codes y plus (x̂ L2ᵀ) L1ᵀ, less the zero points' part: offsets times x̂ summed by groups."""
        low, offsets = self.low_rank(), self.scales.offsets()
        if offsets is not None:
            y = y - ref.grouped(hat, self.weight).sum(-1) @ offsets.T
        return y if low is None else y + F.linear(F.linear(hat, low[1].float()), low[0].float())

    @property
    def has_integers(self) -> bool:
        """Whether the weights are integers times one number a row, two-level scales multiplied out."""
        form = self.weight
        one_a_row = form.scale == "int8" or (form.scale == "fp32" and not form.group)
        return form.element == "int" and form.span != "affine" and one_a_row

    def integers(self) -> Tensor:
        """(O, I) int8 numbers whose fp32 scale is one a row, `steps()`. Only where `has_integers`."""
        if self.weight.scale == "int8":
            return (ref.grouped(self.codes(), self.weight) * self.scales.groups.unsqueeze(-1)).flatten(-2)
        return self.codes()

    def steps(self) -> Tensor:
        """(O,) fp32, for `integers`"""
        return (self.scales.groups if self.scales.steps is None else self.scales.steps).flatten()


class Linear(Protocol):
    """A packed layer: (N, T, I) float32 to (N, T, O) float32, which is the residual's x where there is one."""

    def __call__(
        self, x: Tensor, *, modulation: Modulation | None = None, gelu: bool = False, residual: Residual | None = None
    ) -> Tensor: ...


class Composed(ABC):
    """The schema out of torch's own operations, around `core`; the definition of what fused backends compute."""

    @abstractmethod
    def core(self, x: Tensor) -> Tensor:
        """(N, T, I) to (N, T, O)"""

    def __call__(
        self, x: Tensor, *, modulation: Modulation | None = None, gelu: bool = False, residual: Residual | None = None
    ) -> Tensor:
        if modulation is not None:
            x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
            x = x * (1 + modulation.scale[:, None]) + modulation.shift[:, None]
        y = self.core(x)
        y = F.gelu(y, approximate="tanh") if gelu else y
        return y if residual is None else residual.x.add_(residual.gate[:, None] * y)


class Dequantized(Composed):
    """Weights as fp32 numbers, decoded once; activations rounded as the layer says. Any format, any device."""

    def __init__(self, layer: Layer) -> None:
        self.layer = replace(layer, scales=layer.scales._replace(zeros=None))
        self.weight = ref.dequantize(layer.codes(), layer.scales, layer.weight)

    def core(self, x: Tensor) -> Tensor:
        layer, hat = self.layer, self.layer.transform(x)
        y = F.linear(ref.fake_quantize(hat, layer.act) if layer.act else hat, self.weight, layer.bias)
        return layer.completed(y, hat)


class TorchInt8(Composed):
    """The integer product by torch._int_mm; only right on processors with VNNI (see ops.available)."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.steps = layer, layer.steps()
        self.integers = layer.integers().t().contiguous()

    @staticmethod
    def takes(layer: Layer) -> bool:
        """Whether this backend computes such a layer."""
        return layer.has_integers and layer.act == Format(8)

    def core(self, x: Tensor) -> Tensor:
        layer, hat = self.layer, self.layer.transform(x.flatten(0, 1))
        codes, scales = ref.quantize(hat, Format(8))
        y = layer.completed(torch._int_mm(codes, self.integers).float() * scales.groups * self.steps, hat)
        return (y if layer.bias is None else y + layer.bias).view(*x.shape[:-1], -1)
