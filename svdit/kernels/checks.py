"""The values of a stored layer, checked when it is loaded and packed: a file may hold any bytes.

Names, shapes and types are checked by `layer.Layer` itself.
"""

import torch
from torch import Tensor

from svdit.errors import UserError
from svdit.kernels import reference as ref
from svdit.kernels.formats import TWO_LEVEL, Format
from svdit.kernels.layer import Layer


def check(layer: Layer) -> None:
    """Raises UserError for tensors that are missing and for values that no quantization produces."""
    if missing := layer.spec.tensors(*layer.shape).keys() - {"bias"} - layer.tensors.keys():
        raise UserError(f"the layer lacks {', '.join(sorted(missing))}; pass all tensors of its format")
    if layer.device.type == "meta":
        return
    for name, _, _, form in layer.spec.matrices(*layer.shape):
        if form:
            check_scales(name, ref.layer_scales(layer, name), form)
            check_codes(name, layer, form)
    for name, tensor in layer.tensors.items():
        if tensor.dtype in (torch.float32, torch.bfloat16):
            expect(name, "NaN or Inf", tensor.isfinite())
    if layer.in_scale is not None:
        expect(
            "in_scale", "numbers that are not positive", (layer.in_scale > 0) & layer.in_scale.reciprocal().isfinite()
        )


def check_scales(name: str, scales: ref.Scales, form: Format) -> None:
    """Raises UserError unless scales (…, G) are finite and positive, or not zero in formats with signed scales."""
    groups, largest = scales.groups.float(), TWO_LEVEL.get(form.scale, torch.inf)
    size = groups.abs() if form.span == "full" else groups
    expect(f"{name}_scales", "numbers that are no scales", (size > 0) & (size <= largest) & scales.values().isfinite())
    if scales.steps is not None:
        expect(f"{name}_steps", "numbers that are not positive", scales.steps > 0)
    if scales.zeros is not None:
        expect(f"{name}_zeros", "codes out of range", (scales.zeros >= form.lo) & (scales.zeros <= form.hi))


def check_codes(name: str, layer: Layer, form: Format) -> None:
    """Raises UserError for codes that the format does not use; of most formats all bit patterns are codes."""
    if form.element == "e4m3":
        expect(f"{name}_codes", "NaN", ~ref.layer_codes(layer, name).float().isnan())
    elif form.span == "symmetric":
        expect(f"{name}_codes", "codes out of range", ref.layer_codes(layer, name).amin() >= form.lo)


def expect(name: str, problem: str, good: Tensor) -> None:
    """Raises UserError unless `good` (…) is true everywhere."""
    if not good.all():
        raise UserError(f"{name} contains {problem}; quantize the model again")
