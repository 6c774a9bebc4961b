"""The backends of quantized layers, chosen by device and capability; `SVDIT_BACKEND` or an argument overrides.

Each packs a stored layer (`layer.Layer`) once and computes

    y = residual + gate · gelu(linear(modulate(norm(x))))        every part around `linear` optional

Activation codes, unpacked weights and int32 sums are the same in all of them; floats differ by rounding.
Layers the backend does not support fall back to `dequant`; `unsupported` says why.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from svdit.errors import UserError, unknown
from svdit.kernels import fused, generic
from svdit.kernels.checks import check
from svdit.kernels.cpu import choice, ffi
from svdit.kernels.cpu import linear as cpu
from svdit.kernels.cuda import backend as cuda
from svdit.kernels.fused import by_image, composed
from svdit.kernels.layer import HeadNorms, Layer, Linear, LinearSpec, Rotation

Shape = tuple[int, int]  # (O, I)


@dataclass(frozen=True)
class Backend:
    """`missing(device)`: why it is unavailable, empty where it is available. `unsupported(spec, shape, device)`: why it
    does not support a layer. `pack(layer, inner)`: the layer ready to run, None where it is not supported."""

    description: str
    missing: Callable[[torch.device], str]
    unsupported: Callable[[LinearSpec, Shape, torch.device], str]
    pack: Callable[[Layer, bool], Linear | None]


def _nothing(*_: object) -> str:
    return ""


def _pack_for_cpu(layer: Layer, inner: bool) -> Linear | None:
    return cpu.pack(layer, choice.kernels(), choice.attention_dtype() if inner else torch.float32)


BACKENDS = {  # best first
    "cpu": Backend("C kernels for this processor", ffi.missing, cpu.unsupported, _pack_for_cpu),
    "torch-int8": Backend(
        "torch's integer product, on processors with VNNI",
        generic.torch_int8_missing,
        generic.torch_int8_unsupported,
        generic.torch_int8,
    ),
    "triton": Backend(
        "kernels for CUDA devices of capability 8.0 and above", cuda.missing, cuda.unsupported, cuda.pack
    ),
    "dequant": Backend("weights decoded once, products in fp32", _nothing, _nothing, generic.dequantized),
    "reference": Backend("the definition; weights decoded at every call", _nothing, _nothing, generic.reference),
}


def reasons(device: torch.device | str = "cpu") -> dict[str, str]:
    """For each backend why it is unavailable on `device`; empty where it is available."""
    return {name: backend.missing(torch.device(device)) for name, backend in BACKENDS.items()}


def choose(device: torch.device | str = "cpu", backend: str | None = None) -> str:
    """`backend`, else SVDIT_BACKEND, else the best for `device`. Raises UserError if it is unknown or unavailable."""
    wanted = backend or os.environ.get("SVDIT_BACKEND") or "auto"
    if wanted not in ("auto", *BACKENDS):
        raise unknown("backend", wanted, ("auto", *BACKENDS))
    if wanted == "auto":
        return next(name for name, backend in BACKENDS.items() if not backend.missing(torch.device(device)))
    if reason := BACKENDS[wanted].missing(torch.device(device)):
        raise UserError(f"backend {wanted} cannot be used here: {reason}; choose auto")
    return wanted


def describe(backend: str) -> str:
    """The backend, and for `cpu` the instruction sets in use."""
    return f"cpu ({choice.choice()})" if backend == "cpu" else backend


def unsupported(spec: LinearSpec, shape: Shape, backend: str, device: torch.device | str = "cpu") -> str:
    """Why `backend` does not support a layer of this spec and shape (O, I), so it runs in fp32; empty: supported."""
    return BACKENDS[backend].unsupported(generic.whole_codes(spec), shape, torch.device(device))


def summary(unsupported: Mapping[str, str]) -> str:
    """One line from the reason (or "") of every quantized layer: "N of M layers in fp32: reason"; empty for none."""
    reasons = Counter(reason for reason in unsupported.values() if reason)
    if not reasons:
        return ""
    counted = [f"{reason} ({count})" if len(reasons) > 1 else reason for reason, count in reasons.most_common()]
    return f"{reasons.total()} of {len(unsupported)} layers in fp32: {'; '.join(counted)}"


def pack(layer: Layer, backend: str, inner: bool = False) -> Linear:
    """The layer as `backend` computes it; decoded to fp32 where it is not supported. Its tensors may be freed then.

    `inner`: only layers and attention of this backend read the output, so it may be bfloat16.
    Raises UserError for tensors that its format does not have.
    """
    check(layer)
    layer = generic.with_whole_codes(layer)
    return BACKENDS[backend].pack(layer, inner) or generic.dequantized(layer)


def together(backend: str, linears: Iterable[Linear]) -> Callable[[], AbstractContextManager[None]]:
    """In what a chain of these layers and of attention may run: their kernels as one call at its end, where nothing but
    kernels reads an output before."""
    chain = backend == "cpu" and all(isinstance(linear, cpu.IntegerLinear) for linear in linears)
    return ffi.together if chain and choice.attention_kernels() else nullcontext


def float_linear(weight: Tensor, bias: Tensor | None, backend: str) -> Linear:
    """A layer that is not quantized, of weight (O, I) and bias (O,) of any float type, computed in fp32."""
    weight, bias = weight.float(), None if bias is None else bias.float()
    if backend == "cpu":
        return cpu.float_linear(weight, bias, choice.kernels())
    return composed(by_image(lambda x: F.linear(x.float(), weight, bias)))


def attention(
    qkv: Tensor, heads: int, backend: str, *, norms: HeadNorms | None = None, rotation: Rotation | None = None
) -> Tensor:
    """softmax(q kᵀ / √head) v of (N, T, 3D) to (N, T, D); q and k first normed and rotated, where asked for.

    In bfloat16 on a GPU, and where `pack` made qkv bfloat16.
    """
    if backend == "triton":
        return cuda.attention(qkv, heads, norms, rotation)
    kernels = choice.attention_kernels() if backend == "cpu" else None
    if kernels and qkv.dtype == kernels.low_dtype:
        return cpu.attention(qkv, heads, kernels, norms, rotation)
    return by_image(partial(fused.attention, heads=heads, norms=norms, rotation=rotation))(qkv)
