"""Whether the CUDA backend is available, which layers it supports and by what. Triton is imported only when it packs.

Integer layers and weight-only ones run by the Triton kernels, FP8 ones by torch's product (fp8.py).
"""

import os
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from svdit.kernels import fused, generic
from svdit.kernels.cuda.fp8 import FP8, float8
from svdit.kernels.formats import Format
from svdit.kernels.layer import HeadNorms, Layer, Linear, LinearSpec, Rotation

GROUP, INT8, INT4 = 64, Format(8), Format(4, 64, "bf16", "full")
MINIMUM = (3, 6)  # Triton; the oldest whose code the tests accept
HADAMARD = 256  # larger blocks would not fit the registers


def triton_version() -> tuple[int, ...]:
    """Major and minor version of the installed Triton, without importing it; empty where it is not installed."""
    for name in ("triton", "pytorch-triton"):  # the latter comes with nightly builds of torch
        try:
            return tuple(map(int, version(name).split(".")[:2]))
        except PackageNotFoundError:
            continue
    return ()


def missing(device: torch.device) -> str:
    """Why the backend is unavailable on `device`; empty where it is available, as on a CPU under TRITON_INTERPRET=1."""
    if not triton_version():
        return "triton is not installed"
    if triton_version() < MINIMUM:
        return "it needs Triton 3.6 or later; older ones fuse multiply-adds, which changes codes"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "there is no CUDA device that torch can use"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"it needs compute capability 8.0, and {device} has {major}.{minor}"


def unsupported(spec: LinearSpec, shape: tuple[int, int], device: torch.device) -> str:
    """Why the backend does not support a layer of this spec and shape (O, I); empty where it does."""
    form, act = spec.weight, spec.act
    if form is None:
        return generic.FACTORS_ONLY
    if FP8 in (form, act):
        return _float8(form, act, shape, device)
    if form.element != "int" or form.span == "unsigned" or form.bits not in (4, 8) or form.group % GROUP:
        return f"the CUDA kernels read signed integer weights in groups of a multiple of {GROUP}, not {form}"
    if act is None:
        return ""
    if act not in (INT8, INT4):
        return f"the CUDA kernels read activations in INT8, or in INT4 with bf16 scales per {GROUP}, not {act}"
    if not generic.has_integers(spec):
        return f"{form} weights with {form.scale} scales are not integers with one scale per row"
    if spec.hadamard > HADAMARD:
        return f"Hadamard blocks of {spec.hadamard} are larger than {HADAMARD}"
    return ""


def _float8(form: Format, act: Format | None, shape: tuple[int, int], device: torch.device) -> str:
    if form != FP8 or act != FP8:
        return f"torch's FP8 product multiplies {FP8} with {FP8}, not {form} weights with {act or 'float'} activations"
    if any(side % 16 for side in shape):
        return f"torch's FP8 product needs sides divisible by 16, not {shape[0]} by {shape[1]}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return "FP8 products need compute capability 9.0"
    return ""


def pack(layer: Layer, inner: bool = False) -> Linear | None:
    """The layer for this backend; None where it does not support it."""
    if unsupported(layer.spec, layer.shape, layer.device):
        return None
    if layer.spec.weight == FP8:
        return float8(layer)
    from svdit.kernels.cuda.linear import IntegerLinear, weight_only

    return IntegerLinear(layer, inner) if layer.spec.act else weight_only(layer)


def attention(qkv: Tensor, heads: int, norms: HeadNorms | None, rotation: Rotation | None) -> Tensor:
    """`fused.attention`, (N, T, 3D) to (N, T, D), in bfloat16 on a GPU; norms and rotation in one kernel."""
    qkv = qkv.bfloat16() if qkv.is_cuda else qkv
    if norms is None and rotation is None:
        return fused.attention(qkv, heads)
    from svdit.kernels.cuda.attention import prepared_attention

    return prepared_attention(qkv, heads, norms, rotation)
