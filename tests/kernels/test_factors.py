"""Quantized factors, and groups of 128 weights beside groups of 64 activations, on the C kernels."""

from dataclasses import replace

import pytest
import torch
from layers import U, branch_bound, random_layer, with_spec

from svdit.kernels import generic, ops
from svdit.kernels import reference as ref
from svdit.kernels.cpu import ffi
from svdit.kernels.cpu import linear as cpu
from svdit.kernels.formats import ACT_FORMATS, Format
from svdit.kernels.layer import Layer
from svdit.model.dit import DiT
from svdit.quant.config import dit_config, recipe_for
from svdit.quant.quantize import quantize_
from svdit.runtime.accelerate import accelerate, fallbacks

O, I, R = 70, 256, 16
WIDE_GROUPS = Format(4, 128, "int8", "full")

pytestmark = pytest.mark.skipif(bool(ffi.missing()), reason=ffi.missing() or "-")


def with_quantized_factors(layer: Layer, form: Format) -> Layer:
    tensors = dict(layer.without("l1").without("l2").tensors)
    for name in ("l1", "l2"):
        tensors |= ref.encoded(name, *ref.quantize(layer.tensors[name].float(), form), form)
    return replace(layer, spec=replace(layer.spec, factors=form), tensors=tensors)


@pytest.mark.parametrize("isa", ffi.isas())
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_factors_run_on_the_kernels(bits: int, isa: str) -> None:
    """The branch is off by the rounding of both factors to bf16 (2⁻⁹ each) where they are no words."""
    layer = with_quantized_factors(random_layer(O, I, R, Format(8), 1, 64), Format(bits))
    assert cpu.unsupported(layer.spec, layer.shape, layer.device) == ""
    kernels, x = ffi.kernels(isa), torch.randn(9, I, generator=torch.Generator().manual_seed(1))
    packed = cpu.IntegerLinear(layer, kernels)
    hat = ref.transform(layer, x)
    codes, scales = ref.quantize(hat, Format(8))
    main = codes.double() @ generic.integers(layer).double().T * scales.groups.double()
    main = main * generic.row_steps(layer).double()
    l1, l2 = ref.matrix(layer, "l1").double(), ref.matrix(layer, "l2").double()
    low, size = hat.double() @ l2.T @ l1.T, hat.double().abs() @ l2.abs().T @ l1.abs().T
    assert layer.bias is not None
    branch = branch_bound(kernels, hat.double(), l1, l2)
    if kernels.branch_dtype != torch.int16:
        branch = 1.01 * branch + 2.01 * 2.0**-9 * size
    error = (packed(x[None])[0].double() - (main + low + layer.bias)).abs()
    assert (error <= branch + (5 + R) * U * (main.abs() + layer.bias.abs()) + U * low.abs()).all()
    assert error.max() > 0 and low.norm() > 100 * error.norm()


@pytest.mark.parametrize("isa", ffi.isas())
@pytest.mark.parametrize("size", [32, 64])
def test_wide_groups_of_weights_beside_activations_in_groups(size: int, isa: str) -> None:
    """With scales that are powers of two all sums are exact in fp32, so the result is that of the definition."""
    act, g = replace(ACT_FORMATS["int4"], group=size), torch.Generator().manual_seed(size)
    layer = with_spec(random_layer(O, I, 0, WIDE_GROUPS, 0), act=act)
    layer = replace(layer, tensors={**layer.tensors, "residual_steps": torch.full((O, 1), 2.0**-6)})
    assert cpu.unsupported(layer.spec, layer.shape, layer.device) == ""
    codes = torch.randint(-8, 8, (9, I // size, size), generator=g)
    codes[:, :, 3] = -8  # the largest magnitude: scales are exactly 2^k
    scales = torch.exp2(torch.randint(-3, 4, (9, I // size, 1), generator=g).float())
    x = (codes * scales).flatten(1)
    packed = cpu.IntegerLinear(layer, ffi.kernels(isa))
    stored, steps, *_ = packed.quantize(x[None])
    assert torch.equal(stored.int() - packed.offset, codes.flatten(1).int())
    assert torch.equal(steps, scales.flatten(1))
    expected = x.double() @ ref.matrix(layer).double().T
    assert torch.equal(packed(x[None])[0].double(), expected)
    assert expected.abs().min() < 1 < expected.abs().max()


@pytest.mark.parametrize("changes", [{"factors": Format(8)}, {"factors": Format(4)}, {"weight": WIDE_GROUPS}], ids=str)
@pytest.mark.parametrize("preset", ["svdquant", "svdquant-w4a4"])
def test_a_model_has_no_fallbacks(tiny: DiT, preset: str, changes: dict[str, Format]) -> None:
    recipe = replace(recipe_for(preset, smoothing=0, rank=4, iterations=1), **changes)
    if "weight" in changes:
        tiny = DiT(replace(tiny.config, hidden_size=128))
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([3, 500]), torch.tensor([1, 2])
    quantize_(tiny, dit_config(recipe), lambda model: model(x, t, y))
    fast = accelerate(tiny, "cpu")
    assert len(fallbacks(fast)) > 8 and not any(fallbacks(fast).values())
    assert ops.summary(fallbacks(fast)) == ""
