"""Packed layers on a CUDA device through the Triton kernels: launches, tuning, and what they keep.

Tiles are chosen from a small fixed set when a shape is first seen, and remembered on disk by Triton. Under
TRITON_INTERPRET=1, which runs the kernels on CPU tensors for tests, there is one small tile and no bfloat16, which
the interpreter cannot multiply.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton import knobs

from svdit.kernels.cuda.gemm import multiply, weigh
from svdit.kernels.cuda.quantize import quantize_rows
from svdit.kernels.formats import Format
from svdit.kernels.layer import Composed, Layer, Modulation, Residual

HALF, INT8, INT4 = 64, Format(8), Format(4, 64, "bf16", "full")
INTERPRETED = knobs.runtime.interpret
ROW_TILES = [  # num_warps, num_stages: nothing of them is spilled on sm_90, which tests/kernels/test_cuda.py compiles
    triton.Config({"BLOCK_M": m}, num_warps=warps, num_stages=2) for m, warps in ((16, 4), (16, 8), (32, 8), (64, 8))
]
PRODUCT_TILES = [
    triton.Config({"BLOCK_M": m, "BLOCK_O": o}, num_warps=warps, num_stages=stages)
    for m, o, warps, stages in ((128, 256, 8, 3), (128, 128, 8, 4), (64, 128, 4, 4), (64, 64, 4, 4), (32, 64, 4, 4))
]
ROW_TILE = {"BLOCK_M": 64} if INTERPRETED else {}
PRODUCT_TILE = {"BLOCK_M": 64, "BLOCK_O": 128} if INTERPRETED else {}


def product_tiles(tiles: list[Any], _: Any, **how: Any) -> list[Any]:
    """Those to choose from: with groups, sums are in int32 and in fp32 at once, too many for the largest tile."""
    return tiles[1:] if how["GROUPED"] else tiles


def _tuned(kernel: Any, tiles: list[Any], key: str, **options: Any) -> Any:
    """The kernel with tiles chosen by time; the interpreter is given one."""
    return kernel if INTERPRETED else triton.autotune(tiles, key.split(), cache_results=True, **options)(kernel)


ROWS = _tuned(quantize_rows, ROW_TILES, "K rank tuned_for HADAMARD GROUP")
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
    """Codes −8 … 7 (O, width) to bytes (O, width / 2): of 128 columns the first 64 below, the others above."""
    pairs = (codes + 8).to(torch.uint8).view(len(codes), -1, 2, HALF)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1).contiguous()


def spread(scales: Tensor, columns: int, width: int) -> Tensor:
    """Scales of groups (O, G) to one for every 64 columns, (width / 64, O)."""
    each = padded(columns, HALF) // HALF
    whole = scales.repeat_interleave(each // scales.shape[1], 1)
    return F.pad(whole, (0, width // HALF - each), value=1).t().contiguous()


def stored_codes(layer: Layer, width: int) -> Tensor:
    """The weight as the kernels read it: int8 (O, width), or bytes (O, width / 2)."""
    codes = widened(layer.codes(), width)
    return folded(codes) if layer.weight.bits == 4 else codes


def row_distance(part: Tensor, columns: int) -> int:
    """The distance of rows of a modulation or gate (N, columns), checked."""
    assert part.dtype == torch.float32 and part.shape[1] == columns, f"{part.dtype} {tuple(part.shape)}"
    assert part.stride(1) == 1, f"strides {part.stride()} where rows are needed"
    return part.stride(0)


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


class IntegerLinear:
    """W8A8, W4A8 and W4A4: codes of activations and low-rank projection, then the integer product with its epilogue.

    `inner`: nobody but this backend reads the output, so that it is bfloat16.
    """

    def __init__(self, layer: Layer, inner: bool = False) -> None:
        I = layer.columns
        assert layer.act is not None, "activations without a format"
        self.shape, self.hadamard, self.group = layer.shape, layer.hadamard, layer.act.group
        self.block_k = max(128, layer.hadamard)
        self.width, self.bits, self.rank, self.block_r = padded(I, self.block_k), layer.weight.bits, 0, 0
        self.dtype = torch.bfloat16 if inner and not INTERPRETED else torch.float32
        self.weight, self.multiples = stored_codes(layer, self.width), None
        if layer.weight.scale == "int8":
            self.multiples = spread(layer.scales.groups, I, self.width)
        self.channel, self.bias = layer.steps().contiguous(), layer.bias
        self.in_shift = None if layer.in_shift is None else widened(layer.in_shift, self.width)
        self.in_inverse = None if layer.in_scale is None else widened(layer.in_scale.reciprocal(), self.width)
        self.l1: Tensor | None = None
        self.l2: Tensor | None = None
        if low := layer.low_rank():
            self._keep_low_rank(*low)

    def _keep_low_rank(self, l1: Tensor, l2: Tensor) -> None:
        R = l1.shape[1]
        self.block_r = min(128, max(16, triton.next_power_of_2(R)))  # at once in the rows; the product takes 32
        self.rank = padded(R, self.block_r)
        dtype = torch.float32 if INTERPRETED else l1.dtype
        self.l1 = widened(l1.to(dtype), self.rank)
        self.l2 = F.pad(l2.to(dtype), (0, self.width - l2.shape[1], 0, self.rank - R)).contiguous()

    @staticmethod
    def takes(layer: Layer) -> bool:
        """Whether the kernels compute such a layer: integers of one step a row, tokens of 8 bits or INT4 groups."""
        form = layer.weight
        codes = (form.bits == 4 and form.group % HALF == 0) or form == INT8
        return codes and layer.has_integers and layer.act in (INT8, INT4) and layer.hadamard <= 256

    def quantize(self, x: Tensor, modulation: Modulation | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (N, T, I) to codes (M, width), steps (M,) or (M, width / 64), and x̂ L2ᵀ (M, padded R)."""
        N, T, I = x.shape
        M, parts = N * T, self.rank // self.block_r if self.rank else 1
        assert self.shape[1] == I and x.is_contiguous(), f"{tuple(x.shape)} with strides {x.stride()}"
        codes = x.new_empty(M, self.width, dtype=torch.int8)
        steps = x.new_empty((M, self.width // HALF) if self.group else (M,), dtype=torch.float32)
        low = None if self.l2 is None else x.new_empty(M, self.rank, dtype=self.l2.dtype)
        shift, scale = modulation or (None, None)
        stride = 0 if modulation is None else row_distance(modulation.shift, I)
        assert modulation is None or row_distance(modulation.scale, I) == stride, "shift and scale lie differently"
        with device_of(x):
            ROWS[lambda tile: (triton.cdiv(M, tile["BLOCK_M"]), parts)](
                x, shift, scale, self.in_shift, self.in_inverse, self.l2, codes, steps, low,
                M, T, stride, I, self.width, self.rank, triton.next_power_of_2(M),
                HADAMARD=self.hadamard, STAGES=max(0, self.hadamard.bit_length() - 1),
                ROOT=1 / math.sqrt(self.hadamard or 1), GROUP=self.group, BLOCK_R=self.block_r,
                BLOCK_K=self.block_k, enable_fp_fusion=False, **ROW_TILE,
            )  # fmt: skip
        return codes, steps, low

    def __call__(
        self, x: Tensor, *, modulation: Modulation | None = None, gelu: bool = False, residual: Residual | None = None
    ) -> Tensor:
        out = x.new_empty(*x.shape[:2], self.shape[0], dtype=self.dtype) if residual is None else residual.x
        self.multiply(*self.quantize(x.contiguous(), modulation), out, gelu, residual)
        return out

    def multiply(
        self, codes: Tensor, steps: Tensor, low: Tensor | None, out: Tensor, gelu: bool, residual: Residual | None
    ) -> None:
        """What `quantize` gave, to out (N, T, O), which is the residual's x where there is one."""
        (N, T, O), M = out.shape, len(codes)
        assert N * T == M and self.shape[0] == O and out.is_contiguous(), f"{tuple(out.shape)}, strides {out.stride()}"
        gate, stride = (None, 0) if residual is None else (residual.gate, row_distance(residual.gate, O))
        with device_of(codes):
            PRODUCT[lambda tile: (triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(O, tile["BLOCK_O"]),)](
                codes, steps, low, self.weight, self.multiples, self.channel, self.bias, self.l1, gate, out,
                M, O, self.width, self.rank, T, stride, triton.next_power_of_2(M),
                BITS=self.bits, GROUPED=bool(self.group), GELU=gelu, BLOCK_R=min(32, self.block_r), **PRODUCT_TILE,
            )  # fmt: skip


class WeightOnlyLinear(Composed):
    """Quantized weights, float activations, in fp32: for adaLN, whose weights are read for a few rows."""

    def __init__(self, layer: Layer) -> None:
        (_, I), form = layer.shape, layer.weight
        self.shape, self.width, self.bits = layer.shape, padded(I, 128), form.bits
        self.weight, values = stored_codes(layer, self.width), layer.scales.values()
        self.grouped = values.shape[1] > 1
        self.scales = spread(values, I, self.width) if self.grouped else values.flatten().contiguous()
        self.layer = replace(layer, stored=self.weight[:0])

    @staticmethod
    def takes(layer: Layer) -> bool:
        """Whether the kernel computes such a layer: floats in, 8- or 4-bit integer codes."""
        form = layer.weight
        return layer.act is None and form.element == "int" and form.bits in (4, 8) and form.group % HALF == 0

    def core(self, x: Tensor) -> Tensor:
        (O, I), layer = self.shape, self.layer
        hat = layer.transform(x).flatten(0, -2).contiguous()
        M, out = len(hat), hat.new_empty(len(hat), O)
        block_m = min(64, max(16, triton.next_power_of_2(M)))
        with device_of(x):
            weigh[triton.cdiv(O, 64), triton.cdiv(M, block_m)](
                hat, self.weight, self.scales, layer.bias, out, M, O, I, self.width,
                BITS=self.bits, GROUPED=self.grouped, SPLIT=not INTERPRETED, BLOCK_M=block_m, BLOCK_O=64,
            )  # fmt: skip
        return layer.completed(out, hat).view(*x.shape[:-1], O)
