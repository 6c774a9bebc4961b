"""The library of C kernels as Python calls it: instruction sets, structures, pointers. What is computed: linear.py.

Every pointer passed down comes from a tensor whose device, type, shape and layout `pointer` or `row_pointer` checked,
or that was allocated here. The checks raise ValueError, also under `python -O`.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, Structure, addressof, c_int, c_int64, c_void_p, sizeof
from functools import cache
from itertools import groupby
from math import prod
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from svdit.errors import UserError
from svdit.kernels.cpu.build import MissingKernelsError, library
from svdit.kernels.cpu.features import capabilities, permits_tiles

DEPTH_STEP = 16
AVX512 = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni", "fma3")
ISAS: dict[str, tuple[str, ...]] = {  # the `capabilities` each needs; most extensions first
    "amx": (*AVX512, "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
    "avx512bf16": (*AVX512, "avx512_bf16"),
    "avx512vnni": AVX512,
    "avxvnni": ("avx2", "fma3", "avx_vnni"),
    "avx2": ("avx2", "fma3"),
    "neonbf16": ("i8mm", "bf16"),
    "neoni8mm": ("i8mm",),
    "neondot": ("dot",),
    "portable": (),
}


def _structure(name: str, integers: str, pointers: str) -> type[Structure]:
    fields = [(field, c_int64) for field in integers.split()] + [(field, c_void_p) for field in pointers.split()]
    return type(name, (Structure,), {"_fields_": fields})


# The structures of csrc/kernels.h, field by field.
Rows = _structure(
    "Rows",
    "rows depth tokens stride hadamard rank group lo hi offset wide bf16 rms glu",
    "x shift scale in_shift in_inverse l2 l2_steps codes steps low low_steps",
)
Product = _structure(
    "Product",
    "rows depth outputs tokens stride rank bits gelu group floats offset row_steps bf16",
    "codes low low_steps steps weight multiples offsets channel bias l1 l1_steps gate residual out",
)
Attention = _structure("Attention", "images tokens heads head", "qkv weight bias cos sin out")
WeightOnly = _structure("WeightOnly", "rows depth outputs bits groups", "x weight scales bias out")
Packing = _structure("Packing", "outputs depth bits group", "stored multiples weight sums")
Convolution = _structure(
    "Convolution",
    "height width inputs outputs enlarge threads floats",
    "x scale shift weight bias residual out memory",
)
GroupNorm = _structure("GroupNorm", "pixels channels groups piece", "x weight bias moments scale shift")
Projection = _structure("Projection", "rows inputs outputs", "x weight bias out")
Step = _structure("Step", "kind", "first second")
STEPS = ("linear", "attend")  # the kinds of Step
Peak = _structure("Peak", "repeats kind", "")
PEAKS = ("fp32", "int8", "low", "int16")  # kinds of `peak`; low is bf16, or fp32 where attention is
STRUCTURES = (Rows, Product, Attention, WeightOnly, Packing, Convolution, GroupNorm, Projection, Step)
SIGNATURES = {
    "quantize_rows": [POINTER(Rows)],
    "multiply": [POINTER(Product)],
    "linear": [POINTER(Rows), POINTER(Product)],
    "attend": [POINTER(Attention)],
    "weigh": [POINTER(WeightOnly)],
    "convolve": [POINTER(Convolution)],
    "group_norm": [POINTER(GroupNorm)],
    "project": [POINTER(Projection)],
    "pack_weight": [POINTER(Packing)],
    "pack_factor": [c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p],
    "peak": [POINTER(Peak), POINTER(c_int64)],
    "run": [POINTER(Step), c_int64],
    "geometry": [POINTER(c_int64 * 17)],
}


@cache
def isas() -> list[str]:
    """Instruction sets of this machine, those with most extensions first; AMX only if Linux permits it."""
    has = capabilities()
    supported = [isa for isa, needs in ISAS.items() if all(has.get(need, False) for need in needs)]
    return [isa for isa in supported if isa != "amx" or permits_tiles()]


def built(isa: str) -> bool:
    """Whether the library has an instruction set, which older compilers leave out."""
    return hasattr(library(), f"geometry_{isa}")


LOCAL = threading.local()


class Waiting:
    """Calls that wait to run as one, and memory for what they compute, which inner blocks of `together` share."""

    def __init__(self) -> None:
        self.calls: list[tuple[Kernels, int, tuple[Structure, ...]]] = []
        self.buffers: list[Tensor] = []
        self.used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor (…) of `dtype` in the buffer that follows; in a new one where that is smaller."""
        size = prod(shape) * dtype.itemsize
        if self.used == len(self.buffers) or self.buffers[self.used].numel() < size:
            self.buffers[self.used : self.used + 1] = [torch.empty(size, dtype=torch.uint8, device="cpu")]
        self.used += 1
        return self.buffers[self.used - 1][:size].view(dtype).view(shape)

    def run(self) -> None:
        """All calls, those of the same kernels as one. Raises MemoryError as `Kernels.call`."""
        for kernels, calls in groupby(self.calls, key=itemgetter(0)):
            kernels.run([Step(kind, *map(addressof, structures)) for _, kind, structures in calls])


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor (…) of `dtype` for the output of a kernel."""
    waiting: Waiting | None = getattr(LOCAL, "waiting", None)
    return waiting.empty(shape, dtype) if waiting else torch.empty(shape, dtype=dtype, device="cpu")


class Kernels:
    """The functions of one instruction set and the shapes of its tiles."""

    def __init__(self, isa: str) -> None:
        self.isa, self.lib = isa, library()
        if not built(isa):
            raise UserError(f"the CPU kernels were compiled without {isa}, which needs GCC 11, Clang 16 or newer")
        if isa == "amx":
            permits_tiles()  # which a process must ask for
        self.functions = {name: getattr(self.lib, f"{name}_{isa}") for name in SIGNATURES}
        for name, function in self.functions.items():
            function.argtypes, function.restype = SIGNATURES[name], c_int
        numbers = (c_int64 * 17)()
        self.call("geometry", numbers)
        self.panel, self.low_panel, self.low_step, self.wide, self.signed, pairs, words, self.parts, *sizes = numbers
        if sizes != [sizeof(kind) for kind in STRUCTURES]:
            raise RuntimeError(f"structures of csrc/kernels.h have {sizes} bytes; make those of ffi.py match")
        self.low_dtype = torch.bfloat16 if pairs else torch.float32  # of attention
        self.branch_dtype = torch.int16 if words else torch.bfloat16 if self.parts == 2 else torch.float32

    def __reduce__(self) -> tuple[Callable[[str], "Kernels"], tuple[str]]:
        """For copy and pickle."""
        return kernels, (self.isa,)

    def call(self, name: str, *arguments: Any) -> None:
        """The function `name` of this instruction set. Raises MemoryError where it cannot allocate its buffers."""
        if (waiting := getattr(LOCAL, "waiting", None)) is not None:
            waiting.calls.append((self, STEPS.index(name), arguments))
        elif self.functions[name](*arguments):
            raise MemoryError(f"the CPU kernel {name} cannot allocate its buffers")

    def run(self, steps: Sequence[Structure]) -> None:
        """All steps in order. Raises MemoryError as `call`."""
        if failed := self.functions["run"]((Step * len(steps))(*steps), len(steps)):
            raise MemoryError(f"the CPU kernel {STEPS[steps[failed - 1].kind]} cannot allocate its buffers")


@contextmanager
def together() -> Iterator[None]:
    """Calls of this thread wait for the end of the block and then run as one, because after each of them hardly any of
    Python's code is left in cache. Only other waiting calls may read their outputs before; structures keep the tensors
    that they point to. Raises MemoryError as `Kernels.call`.

    Calls of an inner block wait for the end of the outermost one. No call behind it may read what they allocated, for
    the next inner block uses that memory again."""
    if outer := getattr(LOCAL, "waiting", None):
        outer.used = 0
        yield
        return
    LOCAL.waiting = waiting = Waiting()
    try:
        yield
    finally:
        LOCAL.waiting = None
    waiting.run()


@cache
def kernels(isa: str) -> Kernels:
    """Those of an instruction set of `isas`. Raises MissingKernelsError where there is no library."""
    return Kernels(isa)


def missing(device: torch.device = torch.device("cpu")) -> str:  # noqa: B008
    """Why the kernels are unavailable on `device`; empty where they are available."""
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    try:
        library()
    except MissingKernelsError as error:
        return str(error)
    return ""


def padded(n: int, step: int) -> int:
    """n, or the next multiple of `step`."""
    return -(-n // step) * step


def pad(x: Tensor, length: int) -> Tensor:
    """x (n,) followed by zeros, (length,) fp32."""
    out = torch.zeros(length, dtype=torch.float32, device="cpu")
    out[: len(x)] = x
    return out


def pointer(x: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> int | None:
    """The address of x, checked to be contiguous and of that shape (M, …); None for None."""
    if x is None:
        return None
    if not x.is_cpu or x.dtype != dtype:
        raise ValueError(f"got {x.dtype} on {x.device}, expected {dtype} on the CPU")
    if x.shape != shape or not x.is_contiguous():
        raise ValueError(f"got {tuple(x.shape)} with strides {x.stride()}, expected a contiguous {shape}")
    return x.data_ptr()


def row_pointer(x: Tensor, images: int, columns: int, stride: int) -> int:
    """The address of x (images, columns), fp32, checked to have rows `stride` apart."""
    if not x.is_cpu or x.dtype != torch.float32 or x.shape != (images, columns):
        raise ValueError(
            f"got {x.dtype} {tuple(x.shape)} on {x.device}, expected float32 {(images, columns)} on the CPU"
        )
    if x.stride(1) != 1 or (images > 1 and x.stride(0) != stride):
        raise ValueError(f"got strides {x.stride()}, expected ({stride}, 1)")
    return x.data_ptr()


def peaks(kernels: Kernels) -> list[str]:
    """The kinds of `peak` that these kernels have."""
    return [kind for kind in PEAKS if kind != "int16" or kernels.branch_dtype == torch.int16]


def peak(kernels: Kernels, kind: str, repeats: int = 20_000_000) -> float:
    """Operations per second (a multiply-add is two) of all threads on registers, of a kind of PEAKS, for benchmarks."""
    lanes = c_int64()
    start = time.perf_counter()
    kernels.call("peak", Peak(repeats=repeats, kind=PEAKS.index(kind)), lanes)
    seconds = time.perf_counter() - start
    pairs = kernels.low_dtype == torch.bfloat16
    numbers = {"fp32": 1, "int8": 2 if kernels.wide else 4, "low": 2 if pairs else 1, "int16": 2}[kind]  # of a lane
    return 2 * lanes.value * numbers * repeats * torch.get_num_threads() / seconds
