"""The quantization report and `svdit verify` on a GPU: the CPU's numbers."""

import copy

import pytest
import torch
from conftest import randomize
from devices.fake_cuda import FakeCuda, value
from torch import nn

from svdit.cli.verify import expected_bias, layer_errors
from svdit.model.dit import DiT, DiTConfig
from svdit.quant.config import QuantConfig, Rule, dit_config, rank_ratio_config, recipe_for
from svdit.quant.quantize import quantize_
from svdit.report import diagnose
from svdit.sampling import calibration
from svdit.sampling.calibration import calibration_loop


def test_the_expected_bias_of_a_layer_without_one() -> None:
    linear = nn.Linear(64, 32, bias=False)
    config = QuantConfig((Rule("*", recipe_for("w8a8", smoothing=0)),))
    with FakeCuda():
        model = nn.Sequential(copy.deepcopy(linear)).to("cuda")
        x = torch.randn(128, 64).to("cuda")
        quantize_(model, config, lambda m: m(x))
        bias = expected_bias(model[0], linear.to("cuda"))
        assert bias.is_cuda and torch.equal(value(bias), value(model[0].bias))


@pytest.mark.parametrize("preset", ["w4a8", "rank ratio"])
def test_measurements_and_verification(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "CONDITIONS", 64)
    original = randomize(DiT(DiTConfig(4, 2, 4, hidden_size=64, depth=1, num_heads=2, mlp_ratio=1, num_classes=5)))
    model = copy.deepcopy(original)
    assert isinstance(model, DiT) and isinstance(original, DiT)
    outside = ("t_embedder*", "final_layer.linear")  # which the report's inputs do not reach
    config = rank_ratio_config(0.5, 8, skip=outside)
    if preset != "rank ratio":
        config = dit_config(recipe_for(preset))
    lines = quantize_(model, config, calibration_loop(images=2, steps=2)).layers
    expected = diagnose.measure(model, original, lines, 1.5, 0), layer_errors(model, original)
    with FakeCuda():
        model.to("cuda"), original.to("cuda")
        assert layer_errors(model, original) == expected[1]
        found = diagnose.measure(model, original, lines, 1.5, 0)
    spectra, expected_spectra = (numbers.pop("spectra") for numbers in (found, expected[0]))
    assert found == expected[0]
    for name, each in expected_spectra.items():  # of another LAPACK routine: eigenvalues' roots, in float64
        for key in ("original", "transformed", "remaining"):
            assert spectra[name][key] == pytest.approx(each[key], abs=1e-7)
