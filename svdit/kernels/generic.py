"""Backends from torch operations, on any device: `reference`, `dequant`, `torch-int8`; and what every backend prepares.

None of them fuses anything. `dequant` supports every format and is the fallback of all others.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from svdit.kernels import reference as ref
from svdit.kernels.cpu.features import capabilities
from svdit.kernels.formats import Format
from svdit.kernels.fused import by_image, composed
from svdit.kernels.layer import Layer, Linear, LinearSpec

FACTORS_ONLY = "two factors and no quantized weight"


def reference(layer: Layer, inner: bool = False) -> Linear:
    """The definition itself; weights are decoded at every call."""
    return composed(by_image(partial(ref.linear, layer)))


def dequantized(layer: Layer, inner: bool = False) -> Linear:
    """Weights decoded once to fp32, activations quantized as the layer says; factors without a residual stay codes."""
    if layer.spec.weight is None:
        return reference(layer)
    weight, act = ref.matrix(layer), layer.spec.act
    rest = with_float_factors(layer).without("residual")

    def product(hat: Tensor) -> Tensor:
        return F.linear(ref.fake_quantize(hat, act) if act else hat, weight, rest.bias)

    return composed(by_image(lambda x: ref.linear(rest, x, product)))


def torch_int8(layer: Layer, inner: bool = False) -> Linear | None:
    """The integer product by torch._int_mm, exact with VNNI; other x86 processors saturate, Arm was not tested."""
    if torch_int8_unsupported(layer.spec, layer.shape, layer.device):
        return None
    weight, channel = integers(layer).t().contiguous(), row_steps(layer)
    rest = with_float_factors(layer).without("residual")

    def product(hat: Tensor) -> Tensor:
        codes, scales = ref.quantize(hat.flatten(0, -2), Format(8))
        y = torch._int_mm(codes, weight).float() * scales.groups * channel
        return (y if rest.bias is None else y + rest.bias).view(*hat.shape[:-1], -1)

    return composed(by_image(lambda x: ref.linear(rest, x, product)))


def torch_int8_missing(device: torch.device) -> str:
    """Why `torch_int8` is unavailable on `device`; empty where it is available."""
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    has = capabilities()
    return (
        ""
        if has.get("avx512_vnni") or has.get("avx_vnni")
        else "torch's integer product is known to be exact with VNNI only"
    )


def torch_int8_unsupported(spec: LinearSpec, shape: tuple[int, int], device: torch.device) -> str:
    """Why `torch_int8` does not support a layer of this spec; empty where it does."""
    if spec.weight is None:
        return FACTORS_ONLY
    if not has_integers(spec):
        return f"{spec.weight} weights are not integers with one scale per row"
    return "" if spec.act == Format(8) else f"activations are {spec.act or 'not quantized'}, not INT8"


def has_integers(spec: LinearSpec) -> bool:
    """Whether the weights are integers times one number per row, two-level scales multiplied out."""
    form = spec.weight
    if form is None or form.element != "int" or form.span in ("affine", "unsigned"):
        return False
    return form.scale == "int8" or (not form.group and form.scale in ("fp32", "bf16"))


def integers(layer: Layer) -> Tensor:
    """Weights (O, I) as int8 numbers whose fp32 scale is one per row, `row_steps`. Only where `has_integers`."""
    codes, scales = ref.layer_codes(layer), ref.layer_scales(layer)
    if scales.steps is None:
        return codes
    return (ref.grouped(codes, layer.form("residual")) * scales.groups.unsqueeze(-1)).flatten(-2)


def row_steps(layer: Layer) -> Tensor:
    """(O,) fp32, for `integers`"""
    scales = ref.layer_scales(layer)
    return (scales.groups if scales.steps is None else scales.steps).flatten().float()


def less_zero_points(layer: Layer, y: Tensor, hat: Tensor) -> Tensor:
    """y (M, O), the product of x̂ (M, I) and codes, less the zero points' part: offsets times sums of x̂ by group."""
    offsets = ref.layer_scales(layer).offsets()
    return y if offsets is None else y - ref.grouped(hat, layer.form("residual")).sum(-1) @ offsets.T


def shift_in_bias(layer: Layer, compute: Callable[[Tensor], Tensor]) -> Layer:
    """The layer, for float activations, without a subtraction: its bias (O,) is what it `compute`s for zeros (1, I)."""
    if layer.in_shift is None:
        return layer
    bias = compute(layer.in_shift.new_zeros(1, layer.shape[1]))[0]
    return replace(layer, tensors={**layer.without("in_shift").tensors, "bias": bias})


def with_float_factors(layer: Layer, dtype: torch.dtype = torch.float32) -> Layer:
    """Quantized factors decoded once: to bfloat16 with a relative error of 2^−9 per element, to float32 exactly."""
    if layer.spec.factors is None or not layer.spec.rank:
        return layer
    factors = {name: ref.matrix(layer, name).to(dtype) for name in ("l1", "l2")}
    spec = replace(layer.spec, factors=None, factor_dtype="bfloat16" if dtype == torch.bfloat16 else "float32")
    rest = layer.without("l1_").without("l2_")
    return replace(rest, spec=spec, tensors={**rest.tensors, **factors})


def with_whole_codes(layer: Layer) -> Layer:
    """Integer codes of 2 and 3 bits widened to 4, of 5 to 7 to 8: what kernels read."""
    spec = whole_codes(layer.spec)
    if spec.weight is None or spec.weight == layer.spec.weight:
        return layer
    codes = ref.pack(ref.layer_codes(layer), spec.weight)
    return replace(layer, spec=spec, tensors={**layer.tensors, "residual_codes": codes})


def whole_codes(spec: LinearSpec) -> LinearSpec:
    """The spec of `with_whole_codes`; unsigned codes, which no kernel reads, stay as they are."""
    if spec.weight is None or spec.weight.element != "int" or spec.weight.span == "unsigned":
        return spec
    return replace(spec, weight=replace(spec.weight, bits=4 if spec.weight.bits <= 4 else 8))
