"""Tensors that a layer of a format cannot have, by kind: each is refused by name, when it is built or packed."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from layers import random_layer
from torch import Tensor

from svdit.errors import UserError
from svdit.kernels import ops
from svdit.kernels.formats import WEIGHT_FORMATS, Format

SYMMETRIC = Format(4, 64, "bf16")


def first(value: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[0] = value
        return x

    return change


CASES: list[tuple[Format, str, Callable[[Tensor], Tensor], str]] = [
    *((Format(8), "residual_scales", first(bad), "no scales") for bad in (0.0, -1.0, torch.nan, torch.inf)),
    *((SYMMETRIC, "residual_scales", first(bad), "no scales") for bad in (0.0, -1.0, torch.nan)),
    *((WEIGHT_FORMATS["int4"], "residual_scales", first(bad), "no scales") for bad in (0, 16, -16)),
    *((WEIGHT_FORMATS["int4"], "residual_steps", first(bad), "not positive") for bad in (0.0, -1.0)),
    *((WEIGHT_FORMATS["nvfp4"], "residual_scales", first(bad), "no scales") for bad in (0.0, -1.0, torch.nan)),
    *((WEIGHT_FORMATS["int4-zero"], "residual_zeros", first(bad), "out of range") for bad in (8, -9)),
    (WEIGHT_FORMATS["mxfp4"], "residual_codes", first(0), "out of range"),
    (WEIGHT_FORMATS["fp8"], "residual_codes", first(torch.nan), "NaN"),
    (SYMMETRIC, "residual_codes", first(0), "out of range"),
    (Format(8), "residual_codes", first(-128), "out of range"),
    *((Format(8), "in_scale", first(bad), "not positive") for bad in (0.0, -1.0, 1e-45)),
    *((Format(8), name, first(torch.nan), "NaN or Inf") for name in ("bias", "in_shift", "l1", "l2", "in_scale")),
    (Format(8), "l1", lambda x: x.float(), r"l1 is .*float32 and not .*bfloat16"),
    (Format(8), "bias", lambda x: x[:-1], r"bias is \(47,\)"),
    (Format(8), "residual_codes", lambda x: x.to_sparse(), "residual_codes is"),
]


@pytest.mark.parametrize(("form", "name", "change", "message"), CASES)
def test_impossible_tensors_are_refused(
    form: Format, name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    layer = random_layer(48, 64, 4, form, 1)
    ops.pack(layer, "dequant")
    with pytest.raises(UserError, match=rf"{message}.*; "):
        ops.pack(replace(layer, tensors={**layer.tensors, name: change(layer.tensors[name])}), "dequant")


def test_missing_and_unknown_tensors_are_refused() -> None:
    layer = random_layer(48, 64, 4, Format(8), 1)
    with pytest.raises(UserError, match="lacks residual_scales"):
        ops.pack(layer.without("residual_scales"), "dequant")
    with pytest.raises(UserError, match="stores no tensor 'l3'"):
        replace(layer, tensors={**layer.tensors, "l3": torch.ones(1)})
    with pytest.raises(UserError, match="has no weight"):
        replace(layer, shape=(0, 64))
