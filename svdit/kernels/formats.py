"""Number formats as data: a new one is a line, not a class.

A row of numbers x is stored as codes and scales, x ≈ s · value(code), with one scale for `group` neighbours.
Two-level scales (`int8`, `e4m3`) are small multiples of one fp32 step a row: four-bit codes times an int8 multiple
expand exactly to INT8, so that the product stays one INT8 product.
"""

from dataclasses import dataclass
from typing import Literal

from svdit.errors import UserError

ScaleType = Literal["fp32", "bf16", "int8", "e4m3", "e8m0"]
SCALE_BYTES: dict[ScaleType, int] = {"fp32": 4, "bf16": 2, "int8": 1, "e4m3": 1, "e8m0": 1}
TWO_LEVEL: dict[ScaleType, float] = {
    "int8": 15.0,
    "e4m3": 448.0,
}  # the largest multiple; 15 keeps −8 · −15 within eight bits
ELEMENT_MAX = {"e2m1": 6.0, "e4m3": 448.0}


@dataclass(frozen=True)
class Format:
    """How a row is stored. `span` of integer codes, for b bits:

    symmetric −(2^(b−1)−1)…2^(b−1)−1; full −2^(b−1)…2^(b−1)−1 with a signed scale that puts the element of largest
    magnitude on −2^(b−1); unsigned 0…2^b−1 for rows that are never negative; affine −2^(b−1)…2^(b−1)−1 with a zero
    point a group, x ≈ s · (code − zero), that fits the codes to the group's smallest and largest element.
    """

    bits: int = 8
    group: int = 0  # 0: one scale for the whole row
    scale: ScaleType = "fp32"
    span: Literal["symmetric", "full", "unsigned", "affine"] = "symmetric"
    element: Literal["int", "e2m1", "e4m3"] = "int"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UserError(f"{self.bits} bits cannot be stored; choose 2 to 8")
        if self.element != "int" and self.bits != {"e2m1": 4, "e4m3": 8}[self.element]:
            raise UserError(f"an {self.element} number has not {self.bits} bits")
        if self.group < 0:
            raise UserError(f"groups of {self.group} are impossible; give 0 for whole rows, or 64, for example")

    @property
    def lo(self) -> int:
        """The smallest code."""
        return {"symmetric": -self.hi, "unsigned": 0, "full": -self.hi - 1, "affine": -self.hi - 1}[self.span]

    @property
    def hi(self) -> int:
        """The largest code."""
        return 2**self.bits - 1 if self.span == "unsigned" else 2 ** (self.bits - 1) - 1

    def groups(self, columns: int) -> int:
        """Scales in a row of that many columns."""
        if self.group and columns % self.group:
            raise UserError(f"rows of {columns} cannot be cut into groups of {self.group}; choose another group size")
        return columns // self.group if self.group else 1

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes that codes, scales and steps of a (rows, columns) matrix take on disk."""
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
