"""GPTQ: nearest rounding where inputs are white, better than nearest where they are not."""

import pytest
import torch
from helpers import hard_inputs

from svdit.kernels import reference as ref
from svdit.kernels.formats import WEIGHT_FORMATS
from svdit.quant.gptq import DAMPING, Inverse, gptq, invert_lower_
from svdit.quant.lowrank import output_error
from svdit.quant.rounding import round_weight, weight_scales

W = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))


def hard_moment() -> torch.Tensor:
    x = hard_inputs().double()
    return x.T @ x / len(x)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_white_inputs_give_rounding_to_nearest(name: str) -> None:
    form = WEIGHT_FORMATS[name]
    values = weight_scales(W, form, None).values()
    codes = gptq(W, Inverse(torch.eye(128, dtype=torch.float64)), values, form)
    assert torch.equal(codes.float(), ref.encode(W, values, form).float())


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_correlated_inputs_profit(name: str) -> None:
    form, R, errors = WEIGHT_FORMATS[name], hard_moment(), []
    inverse = Inverse(R)
    for used in (None, inverse):
        codes, scales = round_weight(W, form, None, used)
        errors.append(output_error(W - ref.dequantize(codes, scales, form), R))
    assert 0 < errors[1] < 0.7 * errors[0]
    assert errors[1] / errors[0] == pytest.approx(inverse.left, rel=0.25)  # `left` assumes equal noise


def test_the_factor_is_that_of_the_inverse() -> None:
    R = hard_moment()
    inverse = Inverse(R)
    assert inverse.damping == DAMPING
    damped = R[inverse.order][:, inverse.order]
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    identity = inverse.upper.double().T @ inverse.upper.double() @ damped
    assert (identity - torch.eye(128)).abs().max() < 1e-2
    assert (R.diagonal()[inverse.order].diff() <= 0).all()


def test_a_triangle_is_inverted_in_place() -> None:
    L = torch.randn(301, 301, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tril() * 0.1
    L.diagonal().add_(3)
    inverse = invert_lower_(L.clone())
    assert (inverse @ L - torch.eye(301)).abs().max() < 1e-12
    assert torch.equal(inverse, inverse.tril())


def test_dead_channels_and_singular_moments_still_round() -> None:
    R = torch.zeros(128, 128, dtype=torch.float64)
    R[:2, :2] = 1.0  # rank one, and 126 dead channels
    codes, _ = round_weight(W, WEIGHT_FORMATS["int8"], None, Inverse(R))
    assert codes.abs().max() == 127


def test_dead_channels_change_no_other_in_any_unit() -> None:
    R = hard_moment()
    R[:3] = R[:, :3] = 0
    small, inverse, live = Inverse(1e-6 * R), Inverse(R), Inverse(R[3:, 3:])
    torch.testing.assert_close(small.upper / 1e3, inverse.upper)
    assert small.left == pytest.approx(inverse.left)
    places = torch.isin(inverse.order, torch.arange(3), invert=True)
    assert torch.equal(inverse.order[places] - 3, live.order)
    torch.testing.assert_close(inverse.upper[places][:, places], live.upper)


def test_failed_factorizations_raise_the_damping() -> None:
    R = torch.eye(128, dtype=torch.float64)
    R[0, 1] = R[1, 0] = 1.05  # not positive definite until damped by more than five per cent
    assert Inverse(R).damping == pytest.approx(0.1)


def test_dead_channels_change_no_prediction() -> None:
    R = torch.zeros(192, 192, dtype=torch.float64)
    R[32:160, 32:160] = hard_moment()
    assert Inverse(R).left == pytest.approx(Inverse(hard_moment()).left, rel=1e-6)
    assert Inverse(torch.zeros_like(R)).left == 1


@pytest.mark.parametrize("name", [name for name, form in WEIGHT_FORMATS.items() if form.group])
@pytest.mark.parametrize("importance", [None, torch.ones(128)], ids=["absmax", "searched"])
def test_a_group_of_zeros_changes_no_other(name: str, importance: torch.Tensor | None) -> None:
    """As in pruned and in block-diagonal layers. The other groups keep the largest scale of their row."""
    form = WEIGHT_FORMATS[name]
    whole, pruned, last = 0.02 * W, 0.02 * W, slice(128 - form.group, 128)
    whole[:, 0] = 0.1
    pruned[:, 0], pruned[:, last] = 0.1, 0
    expected, got = (ref.dequantize(*round_weight(x, form, importance), form) for x in (whole, pruned))
    expected[:, last] = 0
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["int4", "int4-channel", "int4-bf16"])
def test_searched_scales_never_lose(name: str) -> None:
    form = WEIGHT_FORMATS[name]
    importance = torch.rand(128, generator=torch.Generator().manual_seed(3)) * 4

    def error(given: torch.Tensor | None) -> float:
        codes, scales = round_weight(W, form, given)
        return float(((ref.dequantize(codes, scales, form) - W).square() * importance).sum())

    assert error(importance) < 0.95 * error(None)
