"""Packed layers on a CUDA device by the Triton kernels: layouts, launches, tuning.

Tiles are chosen from a small fixed set by time when a shape is first seen, and cached on disk by Triton. Under
TRITON_INTERPRET=1, which runs the kernels on CPU tensors for tests, there is one small tile and no bfloat16, which
the interpreter cannot multiply. Tensors are checked before every launch, also under `python -O`.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton import knobs

from svdit.kernels import generic
from svdit.kernels import reference as ref
from svdit.kernels.cuda.gemm import multiply, weigh
from svdit.kernels.cuda.quantize import quantize_rows
from svdit.kernels.fused import composed
from svdit.kernels.layer import Layer, Linear, Modulation, Residual

HALF = 64  # columns that share scales at least, and that a byte of 4-bit weights holds apart
INTERPRETED = knobs.runtime.interpret
ROW_TILES = [  # num_warps, num_stages: without spilled registers on sm_90: tests/kernels/test_cuda.py compiles them
    triton.Config({"BLOCK_M": m}, num_warps=warps, num_stages=2) for m, warps in ((16, 4), (16, 8), (32, 8), (64, 8))
]
PRODUCT_TILES = [
    triton.Config({"BLOCK_M": m, "BLOCK_O": o}, num_warps=warps, num_stages=stages)
    for m, o, warps, stages in ((128, 256, 8, 3), (128, 128, 8, 4), (64, 128, 4, 4), (64, 64, 4, 4), (32, 64, 4, 4))
]
ROW_TILE = {"BLOCK_M": 64} if INTERPRETED else {}
PRODUCT_TILE = {"BLOCK_M": 64, "BLOCK_O": 128} if INTERPRETED else {}


def product_tiles(tiles: list[Any], _: Any, **how: Any) -> list[Any]:
    """The candidates: with groups, sums are in int32 and in fp32 at once, too many for the largest tile."""
    return tiles[1:] if how["GROUPED"] else tiles


def _tuned(kernel: Any, tiles: list[Any], key: str, **options: Any) -> Any:
    """The kernel with tiles chosen by time; under the interpreter the kernel itself."""
    return kernel if INTERPRETED else triton.autotune(tiles, key.split(), cache_results=True, **options)(kernel)


ROWS = _tuned(quantize_rows, ROW_TILES, "K rank tuned_for RMS GLU HADAMARD GROUP")
PRODUCT = _tuned(
    multiply,
    PRODUCT_TILES,
    "O width rank tuned_for BITS GROUPED GELU",
    restore_value=["out"],
    prune_configs_by={"early_config_prune": product_tiles},
)


def padded(n: int, step: int) -> int:
    """n, or the next multiple of `step`."""
    return -(-n // step) * step


def widened(x: Tensor, width: int) -> Tensor:
    """x (…, K) followed by zeros, (…, width)"""
    return F.pad(x, (0, width - x.shape[-1])).contiguous()


def folded(codes: Tensor) -> Tensor:
    """Codes −8 … 7 (O, width) to bytes (O, width / 2): of 128 columns the first 64 in low halves, others in high."""
    pairs = (codes + 8).to(torch.uint8).view(len(codes), -1, 2, HALF)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1).contiguous()


def spread(scales: Tensor, columns: int, width: int) -> Tensor:
    """Scales of groups (O, G) to one for every 64 columns, (width / 64, O)."""
    each = padded(columns, HALF) // HALF
    whole = scales.repeat_interleave(each // scales.shape[1], 1)
    return F.pad(whole, (0, width // HALF - each), value=1).t().contiguous()


def stored_codes(layer: Layer, width: int) -> Tensor:
    """The weight as the kernels read it: int8 (O, width), or bytes (O, width / 2)."""
    codes = widened(ref.layer_codes(layer), width)
    return folded(codes) if layer.form("residual").bits == 4 else codes


def check_rows(x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises ValueError unless x is contiguous and of that shape (N, T, …), on the device of `like`."""
    if x.shape != shape or not x.is_contiguous() or x.device != like.device:
        found = f"{tuple(x.shape)} with strides {x.stride()} on {x.device}"
        raise ValueError(f"got {found}, expected a contiguous {shape} on {like.device}")


def row_distance(part: Tensor, images: int, columns: int, like: Tensor) -> int:
    """The distance between rows of a modulation or gate (images, columns), fp32, checked. Raises ValueError."""
    if part.dtype != torch.float32 or part.shape != (images, columns) or part.device != like.device:
        found = f"{part.dtype} {tuple(part.shape)} on {part.device}"
        raise ValueError(f"got {found}, expected float32 {(images, columns)} on {like.device}")
    if part.stride(1) != 1:
        raise ValueError(f"got strides {part.stride()}, expected contiguous rows")
    return part.stride(0)


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """The context of x (…): Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


class IntegerLinear:
    """W8A8, W4A8 and W4A4: codes of activations and low-rank projection, then the integer product with its epilogue.

    `inner`: nobody but this backend reads the output, so that it is bfloat16.
    """

    def __init__(self, layer: Layer, inner: bool = False) -> None:
        spec, I = layer.spec, layer.shape[1]
        if spec.act is None:
            raise ValueError("the layer's activations are not quantized")
        self.shape, self.hadamard, self.group = layer.shape, spec.hadamard, spec.act.group
        self.block_k = max(2 * HALF, spec.hadamard)
        self.width, self.bits = padded(I, self.block_k), layer.form("residual").bits
        self.rank, self.block_r = 0, 0
        self.dtype = torch.bfloat16 if inner and not INTERPRETED else torch.float32
        self.weight, self.multiples = stored_codes(layer, self.width), None
        if layer.form("residual").scale == "int8":
            self.multiples = spread(ref.layer_scales(layer).groups, I, self.width)
        self.channel, self.bias = generic.row_steps(layer).contiguous(), layer.bias
        self.in_shift = None if layer.in_shift is None else widened(layer.in_shift, self.width)
        self.in_inverse = None if layer.in_scale is None else widened(layer.in_scale.reciprocal(), self.width)
        self.l1: Tensor | None = None
        self.l2: Tensor | None = None
        if spec.rank:
            floats = generic.with_float_factors(layer, torch.bfloat16).tensors
            self._keep_low_rank(floats["l1"], floats["l2"])

    def _keep_low_rank(self, l1: Tensor, l2: Tensor) -> None:
        R = l1.shape[1]
        self.block_r = min(128, max(16, triton.next_power_of_2(R)))  # at once in the rows; the product reads 32
        self.rank = padded(R, self.block_r)
        dtype = torch.float32 if INTERPRETED else l1.dtype
        self.l1 = widened(l1.to(dtype), self.rank)
        self.l2 = F.pad(l2.to(dtype), (0, self.width - l2.shape[1], 0, self.rank - R)).contiguous()

    def quantize(
        self, x: Tensor, modulation: Modulation | None = None, glu: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (N, T, I or 2I) to codes (M, width), steps (M,) or (M, width / 64), and x̂ L2ᵀ (M, padded R)."""
        (N, T, _), I = x.shape, self.shape[1]
        M, parts = N * T, self.rank // self.block_r if self.rank else 1
        check_rows(x, (N, T, 2 * I if glu else I), self.weight)
        codes = x.new_empty(M, self.width, dtype=torch.int8)
        steps = x.new_empty((M, self.width // HALF) if self.group else (M,), dtype=torch.float32)
        low = None if self.l2 is None else x.new_empty(M, self.rank, dtype=self.l2.dtype)
        shift, scale, rms = modulation or (None, None, False)
        stride = 0 if modulation is None else row_distance(modulation.shift, N, I, x)
        if modulation is not None and row_distance(modulation.scale, N, I, x) != stride:
            raise ValueError(f"shift has rows {stride} apart, scale {modulation.scale.stride(0)}; they must be equal")
        with device_of(x):
            ROWS[lambda tile: (triton.cdiv(M, tile["BLOCK_M"]), parts)](
                x, shift, scale, self.in_shift, self.in_inverse, self.l2, codes, steps, low,
                M, T, stride, I, self.width, self.rank, triton.next_power_of_2(M),
                RMS=rms, GLU=glu, HADAMARD=self.hadamard, STAGES=max(0, self.hadamard.bit_length() - 1),
                ROOT=1 / math.sqrt(self.hadamard or 1), GROUP=self.group, BLOCK_R=self.block_r,
                BLOCK_K=self.block_k, enable_fp_fusion=False, **ROW_TILE,
            )  # fmt: skip
        return codes, steps, low

    def __call__(
        self,
        x: Tensor,
        *,
        modulation: Modulation | None = None,
        gelu: bool = False,
        residual: Residual | None = None,
        glu: bool = False,
    ) -> Tensor:
        out = x.new_empty(*x.shape[:2], self.shape[0], dtype=self.dtype) if residual is None else residual.x
        self.multiply(*self.quantize(x.contiguous(), modulation, glu), out, gelu, residual)
        return out

    def multiply(
        self, codes: Tensor, steps: Tensor, low: Tensor | None, out: Tensor, gelu: bool, residual: Residual | None
    ) -> None:
        """The results of `quantize` for M rows to out (N, T, O), which is the residual's x where there is one."""
        (N, T, O), M = out.shape, len(codes)
        check_rows(out, (N, M // max(N, 1), self.shape[0]), codes)
        gate, stride = (None, 0) if residual is None else (residual.gate, row_distance(residual.gate, N, O, out))
        with device_of(codes):
            PRODUCT[lambda tile: (triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(O, tile["BLOCK_O"]),)](
                codes, steps, low, self.weight, self.multiples, self.channel, self.bias, self.l1, gate, out,
                M, O, self.width, self.rank, T, stride, triton.next_power_of_2(M),
                BITS=self.bits, GROUPED=bool(self.group), GELU=gelu, BLOCK_R=min(32, self.block_r), **PRODUCT_TILE,
            )  # fmt: skip


def weight_only(layer: Layer) -> Linear:
    """Quantized weights, float activations, in fp32: for adaLN, whose weights are read for a few rows."""
    layer = generic.shift_in_bias(layer, partial(ref.linear, layer))
    (O, I), form, values = layer.shape, layer.form("residual"), ref.layer_scales(layer).values()
    width, grouped = padded(I, 2 * HALF), values.shape[1] > 1
    weight, scales = stored_codes(layer, width), spread(values, I, width) if grouped else values.flatten().contiguous()
    rest = generic.with_float_factors(layer).without("residual_codes")

    def product(hat: Tensor) -> Tensor:
        rows = hat.flatten(0, -2).contiguous()
        M, out = len(rows), rows.new_empty(len(rows), O)
        check_rows(rows, (M, I), weight)
        block_m = min(64, max(16, triton.next_power_of_2(M)))
        with device_of(rows):
            weigh[triton.cdiv(M, block_m), triton.cdiv(O, 64)](  # the second axis ends at 65535
                rows, weight, scales, rest.bias, out, M, O, I, width,
                BITS=form.bits, GROUPED=grouped, SPLIT=not INTERPRETED, BLOCK_M=block_m, BLOCK_O=64,
            )  # fmt: skip
        return generic.less_zero_points(rest, out, rows).view(*hat.shape[:-1], O)

    return composed(lambda x: ref.linear(rest, x, product))
