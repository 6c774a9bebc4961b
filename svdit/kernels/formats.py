"""Number formats as data: a new one is a line, not a class.

A row of numbers x is stored as codes and scales, x ≈ s · value(code), with one scale per `group` neighbors.
Two-level scales (`int8`, `e4m3`) are small multiples of one fp32 step per row: four-bit codes times an int8 multiple
expand exactly to INT8, so the product remains one INT8 product.
"""

from dataclasses import dataclass
from typing import Literal

from svdit.errors import UserError
from svdit.fields import check_types

ScaleType = Literal["fp32", "bf16", "int8", "e4m3", "e8m0"]
Span = Literal["symmetric", "full", "unsigned", "affine"]
Element = Literal["int", "e2m1", "e4m3"]
SCALE_BYTES: dict[ScaleType, int] = {"fp32": 4, "bf16": 2, "int8": 1, "e4m3": 1, "e8m0": 1}
TWO_LEVEL: dict[ScaleType, float] = {"int8": 15.0, "e4m3": 448.0}  # the largest multiple; −8 · −15 fits eight bits
ELEMENT_MAX = {"e2m1": 6.0, "e4m3": 448.0}
ELEMENT_BITS = {"e2m1": 4, "e4m3": 8}


@dataclass(frozen=True)
class Format:
    """How a row is stored. `span` of integer codes, for b bits:

    symmetric −(2^(b−1)−1)…2^(b−1)−1; full −2^(b−1)…2^(b−1)−1 with a signed scale that maps the element of largest
    magnitude to −2^(b−1); unsigned 0…2^b−1 for rows that are never negative; affine −2^(b−1)…2^(b−1)−1 with a zero
    point per group, x ≈ s · (code − zero), that maps the group's minimum and maximum to the ends of the range.
    Raises UserError for what cannot be represented.
    """

    bits: int = 8
    group: int = 0  # 0: one scale for the whole row
    scale: ScaleType = "fp32"
    span: Span = "symmetric"
    element: Element = "int"

    def __post_init__(self) -> None:
        check_types(self)
        if not 2 <= self.bits <= 8:
            raise UserError(f"{self.bits} bits cannot be stored; choose 2 to 8")
        if self.group < 0:
            raise UserError(f"groups of {self.group} are impossible; pass 0 for whole rows, or 64, for example")
        if self.element != "int":
            self._check_floats(ELEMENT_BITS[self.element])
        else:
            self._check_integers()
        if self.scale in TWO_LEVEL and not self.group:
            raise UserError(
                f"scale {self.scale} has two levels, a row and its groups; pass a group size, or scale fp32"
            )

    def _check_floats(self, bits: int) -> None:
        """Raises UserError for float elements that cannot be represented."""
        if self.bits != bits:
            raise UserError(f"{self.element} elements have {bits} bits, not {self.bits}; pass bits={bits}")
        if self.span != "symmetric":
            raise UserError(f"span {self.span} is for integers, not for {self.element} elements; pass span='symmetric'")

    def _check_integers(self) -> None:
        """Raises UserError for integer codes that cannot be represented."""
        if self.scale == "e8m0":
            raise UserError("e8m0 scales are for e2m1 and e4m3 elements; choose another scale for integers")
        if self.scale == "e4m3" and self.span == "full":
            raise UserError("span full has negative scales, and e4m3 scales are positive; choose span or scale anew")
        if self.scale == "int8" and max(-self.lo, self.hi) * TWO_LEVEL["int8"] > 127:
            raise UserError(
                f"codes {self.lo} to {self.hi} times multiples up to {TWO_LEVEL['int8']:.0f} overflow eight bits; "
                "use scale bf16, or fewer bits"
            )

    @property
    def lo(self) -> int:
        """The smallest code."""
        return {"symmetric": -self.hi, "unsigned": 0, "full": -self.hi - 1, "affine": -self.hi - 1}[self.span]

    @property
    def hi(self) -> int:
        """The largest code."""
        return 2**self.bits - 1 if self.span == "unsigned" else 2 ** (self.bits - 1) - 1

    def groups(self, columns: int) -> int:
        """Scales per row of that many columns. Raises UserError where groups do not divide the row."""
        if self.group and columns % self.group:
            raise UserError(f"rows of {columns} cannot be cut into groups of {self.group}; choose another group size")
        return columns // self.group if self.group else 1

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of the codes, scales and steps of a matrix (rows, columns) on disk."""
        codes = -(-columns * self.bits // 8)
        group = SCALE_BYTES[self.scale] + (self.span == "affine")
        return rows * (codes + self.groups(columns) * group + 4 * (self.scale in TWO_LEVEL))

    def __str__(self) -> str:
        name = {"int": f"INT{self.bits}", "e2m1": "FP4 E2M1", "e4m3": "FP8 E4M3"}[self.element]
        return f"{name} g{self.group}" if self.group else name


WEIGHT_FORMATS = {
    "int8": Format(8),
    "int4-channel": Format(4, span="full"),
    "int4": Format(4, 64, "int8", "full"),
    "int4-bf16": Format(4, 64, "bf16", "full"),
    "int4-zero": Format(4, 64, "bf16", "affine"),
    "fp8": Format(8, element="e4m3"),
    "nvfp4": Format(4, 16, "e4m3", element="e2m1"),
    "mxfp4": Format(4, 32, "e8m0", element="e2m1"),
}

ACT_FORMATS = {
    "int8": Format(8),
    "int4": Format(4, 64, "bf16", "full"),
    "fp8": Format(8, element="e4m3"),
    "nvfp4": Format(4, 16, "e4m3", element="e2m1"),
    "mxfp4": Format(4, 32, "e8m0", element="e2m1"),
}
