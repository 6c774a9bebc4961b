"""A quantized linear as data, and how a packed one is called. What it computes: `reference.linear`."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from svdit.errors import UserError
from svdit.fields import check_types, from_json
from svdit.kernels.formats import TWO_LEVEL, Format

Shape = tuple[int, ...]
SCALE_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "e4m3": torch.float8_e4m3fn,
    "e8m0": torch.float8_e8m0fnu,
}


def stored(form: Format, rows: int, columns: int) -> dict[str, tuple[Shape, torch.dtype]]:
    """Shape and type of the parts of a quantized matrix (rows, columns): codes, scales, steps, zeros."""
    whole = {"e4m3": torch.float8_e4m3fn}.get(form.element, torch.uint8 if form.span == "unsigned" else torch.int8)
    grouped = (rows, form.groups(columns))
    parts: dict[str, tuple[Shape, torch.dtype]] = {
        "codes": ((rows, -(-columns * form.bits // 8)), whole if form.bits == 8 else torch.uint8),
        "scales": (grouped, SCALE_DTYPES[form.scale]),
    }
    if form.scale in TWO_LEVEL:
        parts["steps"] = ((rows, 1), torch.float32)
    if form.span == "affine":
        parts["zeros"] = (grouped, torch.int8)
    return parts


@dataclass(frozen=True)
class LinearSpec:
    """What a quantized linear stores; enough to build an empty one.

    Raises UserError for fields of other types and for impossible combinations.
    """

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
        check_types(self)
        if self.rank < 0 or (not self.rank and self.weight is None):
            raise UserError(
                f"rank {self.rank} and weight {self.weight} store no weight; pass a format or a rank above 0"
            )
        if self.hadamard < 0 or self.hadamard & (self.hadamard - 1):
            raise UserError(f"a Hadamard block of {self.hadamard} does not exist; choose 0 or a power of two")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LinearSpec":
        """The inverse of `to_dict`. Raises UserError for fields that are unknown or have other values."""
        if not isinstance(fields, Mapping):
            raise UserError(f"a spec is {fields!r}; pass a mapping of the fields of LinearSpec")
        formats = {
            name: from_json(Format, fields[name])
            for name in ("factors", "weight", "act")
            if fields.get(name) is not None
        }
        return from_json(cls, {**fields, **formats})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, as checkpoints hold it."""
        return asdict(self)

    def matrices(self, O: int, I: int) -> Iterator[tuple[str, int, int, Format | None]]:
        """Name, rows, columns and format of every matrix of a layer (O, I)."""
        if self.weight:
            yield "residual", O, I, self.weight
        if self.rank:
            yield "l1", O, self.rank, self.factors
            yield "l2", self.rank, I, self.factors

    def tensors(self, O: int, I: int) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and type of every tensor of a layer (O, I); the bias is optional.

        Raises UserError where groups or Hadamard blocks do not divide a row.
        """
        if self.hadamard and I % self.hadamard:
            raise UserError(f"{I} inputs cannot be cut into Hadamard blocks of {self.hadamard}; choose another size")
        if self.act:
            self.act.groups(I)
        tensors: dict[str, tuple[Shape, torch.dtype]] = {"bias": ((O,), torch.float32)}
        tensors |= {"in_scale": ((I,), torch.float32)} if self.scaled else {}
        tensors |= {"in_shift": ((I,), torch.float32)} if self.shifted else {}
        for name, rows, columns, form in self.matrices(O, I):
            if form:
                tensors |= {f"{name}_{part}": what for part, what in stored(form, rows, columns).items()}
            else:
                tensors[name] = (rows, columns), getattr(torch, self.factor_dtype)
        return tensors

    def nbytes(self, out_features: int, in_features: int, bias: bool = True) -> int:
        """Bytes of all tensors of such a layer, on disk and in memory."""
        tensors = self.tensors(out_features, in_features).items()
        return sum(math.prod(shape) * dtype.itemsize for name, (shape, dtype) in tensors if bias or name != "bias")


@dataclass(frozen=True)
class Layer:
    """A quantized linear as stored: its spec, and its tensors under the names they have in a checkpoint.

    residual_codes (O, bytes), l1_codes (O, bytes), l2_codes (R, bytes)     bytes of codes, see `reference.pack`
    residual_scales (O, G), l1_scales, l2_scales    in the format's type, with …_steps (O, 1) fp32 where scales have
                                                    two levels and …_zeros (O, G) int8 where the format is affine
    l1 (O, R), l2 (R, I)                            float factors, in place of codes
    bias (O,), in_scale (I,), in_shift (I,)         each optional
    Raises UserError for tensors of other names, shapes or types than the spec's. Parts of a layer may be missing,
    until `check` is called.
    """

    spec: LinearSpec
    shape: tuple[int, int]  # (O, I)
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise UserError(f"a layer of shape {self.shape} has no weight; pass one of at least (1, 1)")
        wanted = self.spec.tensors(*self.shape)
        for name, tensor in self.tensors.items():
            if name not in wanted:
                raise UserError(f"a layer of this format stores no tensor {name!r}; pass {', '.join(wanted)}")
            shape, dtype = wanted[name]
            if tensor.shape != shape or tensor.dtype != dtype or tensor.layout != torch.strided:
                actual = f"{tuple(tensor.shape)} {tensor.dtype}"
                raise UserError(f"{name} is {actual} and not {shape} {dtype}; pass the tensors of the format")

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
    """First LayerNorm, or RMSNorm, without weights (ε 1e-6), then x · (1 + scale) + shift; (N, I) each.

    A weight w of RMSNorm belongs into the scale: (1 + scale) w − 1.
    """

    shift: Tensor
    scale: Tensor
    rms: bool = False


class Residual(NamedTuple):
    """x (N, T, O) becomes x + gate · y in place; gate (N, O)."""

    x: Tensor
    gate: Tensor


class HeadNorms(NamedTuple):
    """Norms of queries and keys over the head, weights (2, head): LayerNorm (ε 1e-5) with a bias (2, head), else
    RMSNorm (ε 1e-6)."""

    weight: Tensor
    bias: Tensor | None = None


class Rotation(NamedTuple):
    """Rotary positions of queries and keys: x · cos + rot(x) · sin, tables (T, head); rot(x₀, x₁) = (−x₁, x₀)."""

    cos: Tensor
    sin: Tensor


class Linear(Protocol):
    """A packed layer: y = residual + gate · gelu(linear(modulate(norm(x)))), every part around `linear` optional.

    (N, T, I) float32 to (N, T, O) float32, which is the residual's x where there is one. With `glu` x is (N, T, 2I),
    of which silu(x[…, :I]) · x[…, I:] is the input of the layer.
    """

    def __call__(
        self,
        x: Tensor,
        *,
        modulation: Modulation | None = None,
        gelu: bool = False,
        residual: Residual | None = None,
        glu: bool = False,
    ) -> Tensor: ...
