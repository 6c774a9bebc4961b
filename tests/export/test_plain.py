"""Quantized layers multiplied out compute what the quantized model does, but for the rounding of activations."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import relative
from families import inputs, small

from svdit.checkpoints.store import load_model, save_model
from svdit.cli import command
from svdit.export.plain import multiplied_out
from svdit.model.dit import DiT
from svdit.quant.config import RECIPES, dit_config, recipe_for
from svdit.quant.linear import quantized_layers
from svdit.quant.quantize import quantize_
from svdit.sampling.calibration import calibration_loop

PRESETS = ("w8a8", "w4a4", "svdquant-w4a4", "smoothquant", "rtn", "fp8")
CASES = [*(("dit", preset) for preset in PRESETS), ("sit", "w4a4"), ("lightningdit", "w4a4"), ("jit", "w4a4")]


@pytest.mark.parametrize(("family", "preset"), CASES)
def test_the_floats_compute_what_a_weight_only_model_does(family: str, preset: str) -> None:
    """Centring, smoothing and rotation alone and together; the model's activations are not rounded here."""
    model = small(family)
    quantize_(model, dit_config(replace(RECIPES[preset], rank=4)), calibration_loop(images=4, steps=4))
    for layer in quantized_layers(model).values():
        layer.spec = replace(layer.spec, act=None)
    tensors = multiplied_out(model)
    plain = DiT(model.config).eval()
    plain.load_state_dict(tensors)
    with torch.no_grad():
        x = inputs(model)
        assert quantized_layers(model) and not quantized_layers(plain)
        assert relative(plain(*x), model(*x)) < 1e-5


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_the_file_is_read_as_a_published_one(suffix: str, tmp_path: Path) -> None:
    source, quantized, output = (tmp_path / name for name in ("source.pt", "quantized.pt", f"float{suffix}"))
    model = small("dit")
    save_model(model, source)
    quantize_(model, dit_config(recipe_for("w4a8", rank=4)), calibration_loop(images=4, steps=4))
    save_model(model, quantized)
    command("export", [str(quantized), "--to", "float", "--output", str(output)])
    plain = load_model(output, family="dit", num_heads=model.config.num_heads)
    assert plain.config == model.config
    expected, names = multiplied_out(model), load_model(source).state_dict().keys()
    assert plain.state_dict().keys() == names
    assert all(torch.equal(tensor, expected[name]) for name, tensor in plain.state_dict().items())
    if suffix == ".pt":  # and by torch alone
        assert torch.load(output, weights_only=True).keys() == names
