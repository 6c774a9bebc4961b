"""Measurements of layers: rows by group, errors, spectra, smoothing scales, histograms."""

import json
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from conftest import relative
from torch import Tensor, nn

from svdit.kernels.formats import ACT_FORMATS, WEIGHT_FORMATS
from svdit.quant.config import recipe_for
from svdit.quant.linear import LinearSpec, SVDLinear
from svdit.quant.observe import Statistics
from svdit.quant.solve import quantize_linear
from svdit.report.measurements import histograms, layer_inputs, relative_errors, scale_quantiles, spectrum


class Toy(nn.Module):
    """A linear on (N, T, 4) and one on (N, 4); the loop also calls the second one directly."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.rows = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.tokens(x).mean(1) + self.rows(x[:, 0])


def loop(model: nn.Module) -> None:
    """Two calls of three images of five tokens; every value of an image is its noise level."""
    for levels in ([1, 2, 1], [2, 2, 7]):
        noise = torch.tensor(levels)
        model(noise[:, None, None].float().expand(3, 5, 4).contiguous(), noise)
    model.get_submodule("rows")(torch.full((50, 4), -1.0))


def level(x: Tensor, noise: Tensor) -> Tensor:
    return noise


def test_rows_are_kept_by_group_up_to_a_bound() -> None:
    kept = layer_inputs(Toy(), ["tokens", "rows"], loop, level, rows=8)
    assert {key: len(x) for key, x in kept["tokens"].items()} == {1: 8, 2: 8, 7: 5}
    assert {key: len(x) for key, x in kept["rows"].items()} == {1: 2, 2: 3, 7: 1}
    for groups in kept.values():
        for key, x in groups.items():
            assert torch.equal(x, torch.full((len(x), 4), float(key)))


def failing(model: nn.Module) -> None:
    loop(model)
    raise RuntimeError("interrupted")


@pytest.mark.parametrize("run", [loop, failing])
def test_hooks_are_gone_afterwards(run: Callable[[nn.Module], None]) -> None:
    model = Toy()
    try:
        layer_inputs(model, ["tokens", "rows"], run, level, rows=8)
    except RuntimeError:
        assert run is failing
    hooks = [h for module in model.modules() for h in (*module._forward_hooks, *module._forward_pre_hooks)]
    assert hooks == []


def test_errors_are_those_of_the_definition(linear: nn.Linear, statistics: Statistics) -> None:
    layer, report = quantize_linear("x", linear, recipe_for("w4a4", rank=4), statistics)
    rows = statistics.holdout_rows
    errors = relative_errors(linear, layer, {5: rows[:300], 3: rows[300:]})
    assert list(errors) == [5, 3]
    with torch.no_grad():
        y, bias = linear(rows[300:]), linear.bias
        assert errors[3] == pytest.approx(relative(layer(rows[300:]) - bias, y - bias), rel=1e-5)
    together = relative_errors(linear, layer, {0: rows})[0]
    assert -20 * torch.tensor(together).log10() == pytest.approx(report.sqnr, abs=1e-3)
    assert 0.01 < together < 0.2


def test_a_layer_of_zeros_has_no_error() -> None:
    linear = nn.Linear(64, 8)
    nn.init.zeros_(linear.weight)
    layer = SVDLinear(64, 8, spec=LinearSpec(weight=WEIGHT_FORMATS["int8"]))
    layer.bias = linear.bias
    assert relative_errors(linear, layer, {0: torch.randn(5, 64)}) == {0: 0.0}


def test_zeros_are_measured_without_nan() -> None:
    linear = nn.Linear(64, 8)
    nn.init.zeros_(linear.weight)
    layer = SVDLinear(64, 8, spec=LinearSpec(2, weight=WEIGHT_FORMATS["int8"], act=ACT_FORMATS["int8"], hadamard=64))
    nn.init.zeros_(layer.l1)
    measured = [spectrum(linear, layer), *histograms(layer, torch.zeros(5, 64))]
    json.dumps([asdict(each) for each in measured], allow_nan=False)


def test_spectra_are_singular_values_and_the_branch_removes_the_first(linear: nn.Linear) -> None:
    recipe = recipe_for("svdquant", rank=6, low_rank="svd", smoothing=0, factor_dtype="float32")
    layer, _ = quantize_linear("x", linear, recipe, None)
    measured, S = spectrum(linear, layer), torch.linalg.svdvals(linear.weight.detach().double())
    assert measured.rank == 6
    assert measured.original == pytest.approx((S / S.norm()).tolist(), rel=1e-6)
    assert measured.transformed == pytest.approx(measured.original, rel=1e-6)
    assert measured.remaining[:90] == pytest.approx(measured.original[6:], rel=1e-4)
    assert max(measured.remaining[90:]) < 1e-6


def test_the_transforms_spectrum_is_that_of_the_changed_weight(linear: nn.Linear, statistics: Statistics) -> None:
    layer, _ = quantize_linear("x", linear, recipe_for("w4a4", rank=6), statistics)
    measured = spectrum(linear, layer)
    assert layer.in_scale is not None
    S = torch.linalg.svdvals((linear.weight.detach() * layer.in_scale).double())  # a rotation changes none
    assert measured.transformed == pytest.approx((S / S.norm()).tolist(), rel=1e-4)
    assert relative(torch.tensor(measured.transformed), torch.tensor(measured.original)) > 0.01
    assert sum(v**2 for v in measured.remaining) < sum(v**2 for v in measured.transformed)


def test_quantiles_of_the_smoothing_scale() -> None:
    layer = SVDLinear(64, 8, spec=LinearSpec(weight=WEIGHT_FORMATS["int8"], scaled=True))
    assert layer.in_scale is not None
    layer.in_scale.copy_(torch.arange(64.0) + 1)
    assert scale_quantiles(layer) == pytest.approx([1, 7.3, 32.5, 57.7, 64])
    assert scale_quantiles(SVDLinear(64, 8, spec=LinearSpec(weight=WEIGHT_FORMATS["int8"]))) is None


def test_histograms_show_that_the_transform_removes_outliers(linear: nn.Linear, statistics: Statistics) -> None:
    layer, _ = quantize_linear("x", linear, recipe_for("w4a4", rank=4), statistics)
    before, after = histograms(layer, statistics.sample)
    assert before.limit == after.limit
    assert sum(before.shares) == pytest.approx(1, abs=1e-5)
    assert sum(after.shares) == pytest.approx(1, abs=1e-5)
    x = statistics.sample
    assert before.peak == pytest.approx(float((x.abs().amax(1) / x.square().mean(1).sqrt()).mean()), rel=1e-5)
    assert after.peak < 0.7 * before.peak
    assert after.shares.count(0) > before.shares.count(0)


def test_a_layer_without_transform_has_two_equal_histograms() -> None:
    layer = SVDLinear(64, 8, spec=LinearSpec(weight=WEIGHT_FORMATS["int8"], act=ACT_FORMATS["int8"]))
    before, after = histograms(layer, torch.randn(100, 64))
    assert before == after
    assert before.shares[0] > 0 or before.shares[-1] > 0
