"""Whether the Triton kernels can be used, and which of them computes a layer. Triton is imported only when one does."""

import os
from importlib.util import find_spec

import torch

from svdit.kernels.cuda.fp8 import Float8Linear
from svdit.kernels.layer import Dequantized, Layer, Linear


def why_not(device: torch.device | str) -> str:
    """Why the kernels cannot be used on `device`; empty where they can, which is on a CPU under TRITON_INTERPRET=1."""
    device = torch.device(device)
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if device.type != "cuda":
        return f"it computes on CUDA devices, not on {device.type}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "there is no CUDA device that torch can use"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"it needs compute capability 8.0, and {device} has {major}.{minor}"


def pack(layer: Layer, inner: bool) -> Linear:
    """The layer for these kernels, for torch's FP8 product, or decoded where neither takes it."""
    from svdit.kernels.cuda.linear import IntegerLinear, WeightOnlyLinear

    if IntegerLinear.takes(layer):
        return IntegerLinear(layer, inner)
    if WeightOnlyLinear.takes(layer):
        return WeightOnlyLinear(layer)
    return Float8Linear(layer) if Float8Linear.takes(layer) else Dequantized(layer)
