"""A quantized linear as data, and how a packed one is called. What it computes: `reference.linear`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from svdit.errors import UserError
from svdit.kernels.formats import Format


@dataclass(frozen=True)
class LinearSpec:
    """What a quantized linear stores; enough to build an empty one. Raises UserError for impossible combinations."""

    rank: int = 0
    factors: Format | None = None  # None: floats of `factor_dtype`
    factor_dtype: Literal["float32", "bfloat16"] = "float32"
    weight: Format | None = None  # None: no residual
    act: Format | None = None  # None: activations are not quantized
    scaled: bool = False
    shifted: bool = False
    hadamard: int = 0  # block size; 0: no rotation
    rank_ratio: float | None = None  # recorded, where the rank was computed from one

    def __post_init__(self) -> None:
        if self.rank < 0 or (not self.rank and self.weight is None):
            raise UserError(
                f"rank {self.rank} and weight {self.weight} store no weight; pass a format or a rank above 0"
            )
        if self.factor_dtype not in ("float32", "bfloat16"):
            raise UserError(f"factor_dtype is {self.factor_dtype!r}; choose float32 or bfloat16")
        if self.hadamard < 0 or self.hadamard & (self.hadamard - 1):
            raise UserError(f"a Hadamard block of {self.hadamard} does not exist; choose 0 or a power of two")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "LinearSpec":
        """The inverse of `to_dict`."""
        formats = {k: Format(**fields[k]) for k in ("factors", "weight", "act") if fields.get(k)}
        return cls(**{**fields, **formats})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, as checkpoints hold it."""
        return asdict(self)

    def nbytes(self, out_features: int, in_features: int, bias: bool = True) -> int:
        """Bytes of all tensors of such a layer, on disk and in memory."""
        total = 4 * out_features * bias + 4 * in_features * (self.scaled + self.shifted)
        if self.weight:
            total += self.weight.nbytes(out_features, in_features)
        if self.rank and self.factors:
            total += self.factors.nbytes(out_features, self.rank) + self.factors.nbytes(self.rank, in_features)
        elif self.rank:
            total += (out_features + in_features) * self.rank * getattr(torch, self.factor_dtype).itemsize
        return total


@dataclass(frozen=True)
class Layer:
    """A quantized linear as stored: its spec, and its tensors under the names they have in a checkpoint.

    residual_codes (O, bytes), l1_codes (O, bytes), l2_codes (R, bytes)     bytes of codes, see `reference.pack`
    residual_scales (O, G), l1_scales, l2_scales    in the format's type, with …_steps (O, 1) fp32 where scales have
                                                    two levels and …_zeros (O, G) int8 where the format is affine
    l1 (O, R), l2 (R, I)                            float factors, in place of codes
    bias (O,), in_scale (I,), in_shift (I,)         each optional
    Raises UserError where Hadamard blocks do not divide the input.
    """

    spec: LinearSpec
    shape: tuple[int, int]  # (O, I)
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if self.spec.hadamard and self.shape[1] % self.spec.hadamard:
            raise UserError(
                f"{self.shape[1]} inputs cannot be cut into Hadamard blocks of {self.spec.hadamard}; "
                "choose another block size"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return next(iter(self.tensors.values())).device

    @property
    def bias(self) -> Tensor | None:
        """(O,)"""
        return self.tensors.get("bias")

    @property
    def in_shift(self) -> Tensor | None:
        """(I,)"""
        return self.tensors.get("in_shift")

    @property
    def in_scale(self) -> Tensor | None:
        """(I,)"""
        return self.tensors.get("in_scale")

    def form(self, name: str) -> Format:
        """Format of the quantized matrix called `name`: residual, l1 or l2."""
        form = self.spec.weight if name == "residual" else self.spec.factors
        if form is None:
            raise ValueError(f"{name} is not quantized")
        return form

    def columns(self, name: str) -> int:
        """Columns of that matrix."""
        return self.spec.rank if name == "l1" else self.shape[1]

    def detached(self) -> "Layer":
        """The same with tensors that carry no gradient."""
        return replace(self, tensors={name: tensor.detach() for name, tensor in self.tensors.items()})

    def without(self, prefix: str) -> "Layer":
        """The same without the tensors whose name starts with `prefix`, so that their memory can be freed."""
        return replace(self, tensors={k: t for k, t in self.tensors.items() if not k.startswith(prefix)})

    def only(self, prefix: str) -> "Layer":
        """The same with just the tensors whose name starts with `prefix`."""
        return replace(self, tensors={k: t for k, t in self.tensors.items() if k.startswith(prefix)})


class Modulation(NamedTuple):
    """First LayerNorm, then x · (1 + scale) + shift; (N, I) each."""

    shift: Tensor
    scale: Tensor


class Residual(NamedTuple):
    """x (N, T, O) becomes x + gate · y in place; gate (N, O)."""

    x: Tensor
    gate: Tensor


class Linear(Protocol):
    """A packed layer: y = residual + gate · gelu(linear(modulate(LayerNorm(x)))), every part around `linear` optional.

    (N, T, I) float32 to (N, T, O) float32, which is the residual's x where there is one.
    """

    def __call__(
        self, x: Tensor, *, modulation: Modulation | None = None, gelu: bool = False, residual: Residual | None = None
    ) -> Tensor: ...
