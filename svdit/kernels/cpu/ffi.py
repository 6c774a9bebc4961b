"""The library of C kernels as Python calls it: instruction sets, structures, pointers. What is computed: cpu.py.

Every pointer that goes down is taken from a tensor whose type, shape and layout were asserted in `pointer`.
"""

import os
import time
from ctypes import POINTER, Structure, c_int64, c_void_p, sizeof
from functools import cache
from typing import Any

import torch
from torch import Tensor

from svdit.errors import UserError
from svdit.kernels.cpu.build import MissingKernelsError, library
from svdit.kernels.layer import Layer

DEPTH_STEP = 16
ISAS: dict[str, tuple[str, ...]] = {  # best first; what torch.cpu.get_capabilities() must say
    "avx512bf16": ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni", "avx512_bf16", "fma3"),
    "avx512vnni": ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni", "fma3"),
    "avxvnni": ("avx2", "fma3", "avx_vnni"),
    "avx2": ("avx2", "fma3"),
    "portable": (),
}


def _structure(name: str, integers: str, pointers: str) -> type[Structure]:
    fields = [(field, c_int64) for field in integers.split()] + [(field, c_void_p) for field in pointers.split()]
    return type(name, (Structure,), {"_fields_": fields})


# As in csrc/kernels.h.
Rows = _structure(
    "Rows",
    "rows depth tokens stride hadamard rank group lo hi offset wide bf16",
    "x shift scale in_shift in_inverse l2 codes steps low",
)
Product = _structure(
    "Product",
    "rows depth outputs tokens stride rank bits gelu group floats offset row_steps bf16",
    "codes low steps weight multiples offsets channel bias l1 gate residual out",
)


@cache
def isas() -> list[str]:
    """Instruction sets of this processor, best first."""
    has = torch.cpu.get_capabilities()
    return [isa for isa, needs in ISAS.items() if all(has.get(need, False) for need in needs)]


Attention = _structure("Attention", "images tokens heads head", "qkv out")
WeightOnly = _structure("WeightOnly", "rows depth outputs bits groups", "x weight scales bias out")
Packing = _structure("Packing", "outputs depth bits group", "stored multiples weight sums")
Peak = _structure("Peak", "repeats integers", "")
STRUCTURES = (Rows, Product, Attention, WeightOnly, Packing)
SIGNATURES = {
    "quantize_rows": [POINTER(Rows)],
    "multiply": [POINTER(Product)],
    "attend": [POINTER(Attention)],
    "weigh": [POINTER(WeightOnly)],
    "pack_weight": [POINTER(Packing)],
    "pack_factor": [c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p],
    "peak": [POINTER(Peak), POINTER(c_int64)],
    "geometry": [POINTER(c_int64 * 9)],
}


class Kernels:
    """The functions of one instruction set and the shapes of its tiles."""

    def __init__(self, isa: str) -> None:
        self.isa, self.lib = isa, library()
        numbers = (c_int64 * 9)()
        self.call("geometry", numbers)
        self.panel, self.low_panel, self.wide, pairs, *sizes = numbers
        assert sizes == [sizeof(kind) for kind in STRUCTURES], "kernels.h says otherwise"
        self.low_dtype = torch.bfloat16 if pairs else torch.float32

    def call(self, name: str, *arguments: Any) -> None:
        """The function `name` of this instruction set."""
        function = getattr(self.lib, f"{name}_{self.isa}")
        function.argtypes, function.restype = SIGNATURES[name], None
        function(*arguments)

    def pack_weight(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """The weight in panels, and the sums of its integers (O,) int32."""
        (O, I), bits = layer.shape, layer.weight.bits
        count = padded(O, self.panel) * padded(I, DEPTH_STEP) * bits // 8
        packed, sums = (
            torch.full((count,), 0x88 if bits == 4 else 0, dtype=torch.uint8),
            torch.empty(O, dtype=torch.int32),
        )
        call = Packing(outputs=O, depth=I, bits=bits, group=layer.weight.group)
        stored = layer.stored.contiguous()
        call.stored = pointer(stored, torch.int8 if bits == 8 else torch.uint8, (O, -(-I * bits // 8)))
        if layer.weight.scale == "int8":
            groups = layer.scales.groups.contiguous()
            call.multiples = pointer(groups, torch.int8, (O, layer.weight.groups(I)))
        call.weight, call.sums = packed.data_ptr(), sums.data_ptr()
        self.call("pack_weight", call)
        return packed, sums

    def pack_factor(self, factor: Tensor, width: int, step: int) -> Tensor:
        """bf16 (O, R) to panels of `width` outputs, R padded to a multiple of `step`."""
        O, R = factor.shape
        depth = padded(R, step)
        packed = torch.zeros(padded(O, width) * depth, dtype=torch.bfloat16)
        self.call("pack_factor", pointer(factor, torch.bfloat16, (O, R)), O, R, depth, width, packed.data_ptr())
        return packed


@cache
def kernels(isa: str | None = None) -> Kernels:
    """Those of `isa`, or of SVDIT_ISA, or the best of this processor. MissingKernelsError where there is no library."""
    isa = isa or os.environ.get("SVDIT_ISA") or isas()[0]
    if isa not in isas():
        raise UserError(f"SVDIT_ISA is {isa}, but this processor has {', '.join(isas())}")
    return Kernels(isa)


def why_not() -> str:
    """Why the kernels cannot be used here; empty where they can."""
    try:
        kernels()
    except MissingKernelsError as missing:
        return str(missing)
    return ""


def padded(n: int, step: int) -> int:
    """n, or the next multiple of `step`."""
    return -(-n // step) * step


def pad(x: Tensor, length: int) -> Tensor:
    """x (n,) followed by zeros, (length,) fp32."""
    out = torch.zeros(length)
    out[: len(x)] = x
    return out


def pointer(x: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> int | None:
    """The address of x, checked; None for None."""
    if x is None:
        return None
    assert x.device.type == "cpu" and x.dtype == dtype, f"{x.dtype} on {x.device} where {dtype} is needed on the CPU"
    assert x.shape == shape and x.is_contiguous(), f"{tuple(x.shape)} with strides {x.stride()} where {shape} is needed"
    return x.data_ptr()


def row_pointer(x: Tensor, images: int, columns: int, stride: int) -> int:
    """The address of x (images, columns), whose rows lie `stride` apart, checked."""
    assert x.device.type == "cpu" and x.dtype == torch.float32 and x.shape == (images, columns), f"{x.dtype} {x.shape}"
    assert x.stride(1) == 1 and (images == 1 or x.stride(0) == stride), f"strides {x.stride()} where {stride} is needed"
    return x.data_ptr()


def peak(kernels: Kernels, integers: bool, repeats: int = 20_000_000) -> float:
    """Operations a second (a multiply-add is two) of all threads out of registers, for benchmarks."""
    lanes = c_int64()
    start = time.perf_counter()
    kernels.call("peak", Peak(repeats=repeats, integers=integers), lanes)
    seconds = time.perf_counter() - start
    codes = (2 if kernels.wide else 4) if integers else 1
    return 2 * lanes.value * codes * repeats * torch.get_num_threads() / seconds
