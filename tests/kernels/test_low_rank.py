"""The low-rank branch on the C kernels: integers of 16 bits, called words, or sums of two bf16, or fp32."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import layer_of, random_layer, with_spec

from svdit.kernels import generic
from svdit.kernels import reference as ref
from svdit.kernels.cpu import ffi, packing
from svdit.kernels.cpu import linear as cpu
from svdit.kernels.formats import Format

INT8 = Format(8)

pytestmark = pytest.mark.skipif(bool(ffi.missing()), reason=ffi.missing() or "-")


@pytest.fixture(scope="module", params=ffi.isas())
def kernels(request: pytest.FixtureRequest) -> ffi.Kernels:
    return ffi.kernels(request.param)


def test_a_branch_loses_little_to_rounding(kernels: ffi.Kernels) -> None:
    """It holds a layer's largest directions: less than a quarter of what numbers of bf16 would lose, 2⁻⁹."""
    for I, R in ((1152, 32), (200, 16), (300, 100)):
        layer = random_layer(64, I, R, INT8, 1)
        x = torch.randn(50, I, generator=torch.Generator().manual_seed(R))
        codes, steps, *_ = (packed := cpu.IntegerLinear(layer, kernels)).quantize(x[None])
        l1, l2 = ref.matrix(layer, "l1").double(), ref.matrix(layer, "l2").double()
        expected = ref.transform(layer, x).double() @ l2.T @ l1.T
        main = (codes[:, :I].double() - packed.offset) @ generic.integers(layer).double().T
        main = main * steps.double() * generic.row_steps(layer).double()
        bias = torch.zeros(64) if layer.bias is None else layer.bias
        got = packed(x[None])[0].double() - main - bias
        assert float((got - expected).norm() / expected.norm()) < 2**-11


@given(st.integers(1, 3), st.integers(1, 200), st.integers(0, 2**31), st.sampled_from([0, 1, 9]), st.integers(-60, 60))
def test_words_of_factors_never_overflow(O: int, R: int, seed: int, power: int, scale: int) -> None:
    """A run of them times the largest word of activations fits 32 bits; numbers are alike, normal, or few are large."""
    factor = torch.randn(O, R, generator=torch.Generator().manual_seed(seed)) ** power * 2.0**scale
    codes, steps = packing.words(factor)
    for first in range(0, R, packing.RUN):
        assert (codes[:, first : first + packing.RUN].long().abs().sum(1) * packing.WORD < 2**31).all()
    assert ((codes * steps.double()[:, None] - factor).abs() <= 0.501 * steps[:, None]).all()


def test_the_largest_words_sum_exactly(kernels: ffi.Kernels) -> None:
    """Constant rows and factors: no sums of runs are larger. Words of factors are about 2¹¹, and off by 2⁻¹² each."""
    scales = ref.Scales(torch.ones(40, 1))
    for sign in (1.0, -1.0):
        factors = {"l1": sign * torch.ones(40, 100).bfloat16(), "l2": torch.ones(100, 256).bfloat16()}
        layer = layer_of(torch.zeros(40, 256, dtype=torch.int8), scales, INT8, INT8, **factors)
        y = cpu.IntegerLinear(layer, kernels)(torch.ones(1, 9, 256))
        assert (y / (sign * 25600) - 1).abs().max() < 1.01 * 2**-11


def test_rows_that_words_cannot_hold(kernels: ffi.Kernels) -> None:
    """Numbers below 5e-35 are left out of the branch; NaN and Inf make their whole row NaN, and no other."""
    layer = with_spec(random_layer(40, 128, 20, INT8, 4), scaled=False, shifted=False)
    assert layer.bias is None
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    expected = cpu.IntegerLinear(layer, kernels)(x[None])[0]
    x[1], x[2], x[3, 5], x[4, 5] = 0, x[2] * 1e-36, torch.nan, -torch.inf
    x[5], x[6] = x[5] * 1e37, x[6] * 1e-30
    y = cpu.IntegerLinear(layer, kernels)(x[None])[0]
    assert not y[1].any() and y[2].abs().max() < 1e-34
    assert y[3].isnan().all() and y[4].isnan().all()
    assert torch.allclose(y[5] / 1e37, expected[5], rtol=1e-3, atol=1e-3)
    assert torch.allclose(y[6] * 1e30, expected[6], rtol=1e-3, atol=1e-3)
    assert torch.equal(y[[0, 7]], expected[[0, 7]])
