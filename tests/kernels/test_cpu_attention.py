"""Attention in C, with norms and rotation of queries and keys, against float64."""

import pytest
import torch
from conftest import relative
from heads import NORMS, attention_in_float64, attention_inputs, normal, queries_and_keys
from layers import U_BF16, U

from svdit.kernels.cpu import ffi
from svdit.kernels.cpu import linear as cpu

SHAPES = (
    (2, 16, 2, 32), (1, 1, 1, 1), (1, 5, 3, 7), (2, 64, 4, 72), (1, 67, 1, 100), (1, 130, 2, 16), (2, 35, 3, 80),
    (1, 9, 2, 18),
)  # fmt: skip
pytestmark = pytest.mark.skipif(bool(ffi.missing()), reason=ffi.missing() or "-")


@pytest.fixture(scope="module", params=ffi.isas())
def kernels(request: pytest.FixtureRequest) -> ffi.Kernels:
    return ffi.Kernels(request.param)


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_attention(kernels: ffi.Kernels, norm: str, turn: bool) -> None:
    """In bfloat16 norms and rotation are rounded, of each score by chance two numbers the other way than here."""
    low, prepared = kernels.low_dtype, norm != "none" or turn
    for N, T, heads, head in SHAPES:
        if head % 2 and turn:
            continue
        qkv, norms, rotation = attention_inputs(N, T, heads, head, norm, turn)
        q, k, v = (x.to(low).double() for x in queries_and_keys(qkv.to(low), heads, norms, rotation))
        expected = attention_in_float64(q, k, v)
        scores = (q.abs() @ k.abs().transpose(2, 3)).amax() / head**0.5
        weights = U_BF16 if low == torch.bfloat16 else 0  # each is rounded
        turned = 4 * weights * q.abs().amax() * k.abs().amax() / head**0.5 if prepared else 0
        bound = (U * ((2 * head + 20 + 60 * prepared) * scores + 2 * T + 20) + weights + turned) * v.abs().max()
        y = cpu.attention(qkv.to(low), heads, kernels, norms, rotation)
        error = (y - expected).abs().max()
        assert error <= bound and (error > 0 or T == 1), (N, T, heads, head, error / bound)
        alone = [cpu.attention(image, heads, kernels, norms, rotation) for image in qkv.to(low).split(1)]
        assert torch.equal(torch.cat(alone), y)


def test_attention_lets_no_bad_number_vanish(kernels: ffi.Kernels) -> None:
    for bad in (torch.nan, torch.inf):
        for column in (0, 16, 32):  # in q, k, v
            qkv = torch.ones(1, 9, 48, dtype=kernels.low_dtype)
            qkv[0, 4, column] = bad
            y = cpu.attention(qkv, 1, kernels)
            assert not y[0, 4].isfinite().all()
            assert not y.isfinite().all()


def test_weights_of_attention_sum_to_one(kernels: ffi.Kernels) -> None:
    """Also after rounding: equal values of all tokens are the output."""
    qkv = normal(1, 67, 3 * 48)
    qkv[..., 96:] = 3
    y = cpu.attention(qkv.to(kernels.low_dtype), 2, kernels)
    assert (y / 3 - 1).abs().max() <= U * (67 + 4)


def test_scores_far_below_zero(kernels: ffi.Kernels) -> None:
    """Nothing that pads keys to whole tiles may count as the largest score."""
    qkv = normal(1, 9, 3, 1, 32)
    qkv[:, :, 0] = 8
    qkv[:, :, 1] -= 12
    low = qkv.flatten(2).to(kernels.low_dtype)
    expected = attention_in_float64(*queries_and_keys(low, 1, None, None))
    y = cpu.attention(low, 1, kernels)
    assert relative(y.double(), expected) < (0.01 if kernels.low_dtype == torch.bfloat16 else 1e-4)
