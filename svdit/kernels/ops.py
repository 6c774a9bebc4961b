"""The backends of quantized layers, chosen by device and capability; `SVDIT_BACKEND` or an argument overrides.

Each packs a stored layer (`layer.Layer`) once and computes

    y = residual + gate · gelu(SVDLinear(modulate(LayerNorm(x))))        every part around SVDLinear optional

Activation codes, unpacked weights and int32 sums are the same in all of them; floats differ by rounding.
A layer that a backend does not take is computed by `dequant`, never wrongly.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from svdit.errors import UserError
from svdit.kernels.cpu import ffi
from svdit.kernels.cpu import linear as cpu
from svdit.kernels.cuda import backend as cuda
from svdit.kernels.layer import Dequantized, Layer, Linear, TorchInt8

BACKENDS = {
    "cpu": "kernels in C for this processor",
    "torch-int8": "torch's integer product, where the processor has VNNI",
    "triton": "kernels for CUDA devices of capability 8.0 and above",
    "dequant": "weights decoded once, products in floats",
    "reference": "the stored layers themselves",
}


def reasons(device: torch.device | str = "cpu") -> dict[str, str]:
    """For each backend why it cannot be used on `device`; empty where it can."""
    kind = torch.device(device).type
    elsewhere = "" if kind == "cpu" else f"it computes on the CPU, not on {kind}"
    has = torch.cpu.get_capabilities()
    saturates = not (has.get("avx512_vnni") or has.get("avx_vnni"))
    return {
        "cpu": elsewhere or ffi.why_not(),
        "torch-int8": elsewhere or ("without VNNI torch's integer product saturates" if saturates else ""),
        "triton": cuda.why_not(device),
        "dequant": "",
        "reference": "",
    }


def choose(device: torch.device | str = "cpu", backend: str | None = None) -> str:
    """`backend`, else SVDIT_BACKEND, else the best for `device`. UserError where it is unknown or impossible."""
    wanted = backend or os.environ.get("SVDIT_BACKEND") or "auto"
    if wanted not in ("auto", *BACKENDS):
        raise UserError(f"there is no backend {wanted!r}; choose auto, {', '.join(BACKENDS)}")
    missing = reasons(device)
    if wanted == "auto":
        return next(name for name in BACKENDS if not missing[name])
    if missing[wanted]:
        raise UserError(f"backend {wanted} cannot be used here: {missing[wanted]}; choose auto")
    return wanted


def describe(backend: str) -> str:
    """The backend, and for `cpu` the instruction set in use."""
    return f"cpu ({ffi.kernels().isa})" if backend == "cpu" else backend


def pack(layer: Layer, backend: str, inner: bool = False) -> Linear:
    """The layer as `backend` computes it. Its tensors may be freed afterwards.

    `inner`: only layers and attention of this backend read the output, so that it may be bfloat16.
    """
    layer = layer.with_whole_codes()
    if backend == "cpu" and cpu.IntegerLinear.takes(layer):
        return cpu.IntegerLinear(layer, ffi.kernels(), inner)
    if backend == "cpu" and cpu.WeightOnlyLinear.takes(layer):
        return cpu.WeightOnlyLinear(layer, ffi.kernels())
    if backend == "torch-int8" and TorchInt8.takes(layer):
        return TorchInt8(layer)
    if backend == "triton":
        return cuda.pack(layer, inner)
    return Dequantized(layer)


def attention(qkv: Tensor, heads: int, backend: str) -> Tensor:
    """softmax(q kᵀ / √head) v of (N, T, 3D) to (N, T, D); in bfloat16 on a GPU, and where `pack` left qkv in it."""
    if backend == "cpu" and qkv.dtype == ffi.kernels().low_dtype:
        return cpu.attention(qkv, heads, ffi.kernels())
    if backend == "triton" and qkv.is_cuda:
        qkv = qkv.bfloat16()
    N, T, width = qkv.shape
    q, k, v = qkv.view(N, T, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, width // 3)
