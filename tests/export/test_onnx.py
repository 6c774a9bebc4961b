"""ONNX Runtime computes what the model does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative
from families import inputs, small
from torch import Tensor, nn

from svdit.checkpoints.store import load_model
from svdit.cli import command
from svdit.errors import UserError
from svdit.export.graph import Graph
from svdit.export.onnx import Network, onnx_model
from svdit.model.config import FAMILIES
from svdit.model.dit import DiT
from svdit.quant.config import dit_config, recipe_for
from svdit.quant.linear import SVDLinear
from svdit.quant.quantize import quantize_
from svdit.sampling.calibration import calibration_loop

onnxruntime = pytest.importorskip("onnxruntime")


def run(content: Any, *values: Tensor) -> Tensor:
    """The output of a model for its inputs in order."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content.SerializeToString(), options, ["CPUExecutionProvider"])
    named = {each.name: value.numpy() for each, value in zip(session.get_inputs(), values, strict=True)}
    return torch.from_numpy(session.run(None, named)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_floats_equal_the_model(family: str) -> None:
    model = small(family)
    x, t, y = inputs(model)
    with torch.no_grad():
        expected = model(x, t, y)
    got = run(onnx_model(model), x, t.float(), y)
    assert got.shape == expected.shape
    assert relative(got, expected) < 1e-5
    assert relative(run(onnx_model(model), x[:1], t[:1].float(), y[:1]), expected[:1]) < 1e-5  # any batch size


@pytest.mark.parametrize(
    ("family", "preset"), [*((family, "w8a8") for family in FAMILIES), ("dit", "svdquant"), ("jit", "w8a16")]
)
def test_quantized_models_equal_too(family: str, preset: str) -> None:
    """But for activations next to the middle of two codes, which sums in another order tip."""
    model = small(family)
    x, t, y = inputs(model)
    with torch.no_grad():
        exact = model(x, t, y)
        quantize_(model, dit_config(recipe_for(preset, rank=4)), calibration_loop(images=4, steps=4))
        expected = model(x, t, y)
    got = run(onnx_model(model), x, t.float(), y)
    assert relative(got, expected) < (1e-5 if preset == "w8a16" else 0.3 * relative(expected, exact))


@pytest.mark.parametrize("preset", ["w8a8", "svdquant", "rtn"])
def test_a_layer_has_the_same_codes(preset: str) -> None:
    torch.manual_seed(0)
    model, rows = nn.Sequential(nn.Linear(128, 96)), torch.randn(256, 128) * torch.logspace(-2, 1, 128)
    quantize_(model, dit_config_of(preset), lambda m: m(rows))
    layer, x = model[0], torch.cat([rows[:40], torch.zeros(1, 128)])
    assert isinstance(layer, SVDLinear)
    graph = Graph()
    network = Network.__new__(Network)  # the parts of a model without one
    network.graph = graph
    graph.input("x", torch.float32, 128)
    output = network.linear("layer", layer, "x")
    got, expected = run(graph.model(output, (96,), {}), x), layer(x).detach()
    far = (got - expected).abs().amax(1) > 1e-5 * expected.abs().max()
    assert far.sum() <= 1  # rows with a code that was tipped
    assert torch.isfinite(got).all()


def dit_config_of(preset: str) -> Any:
    """The recipe for every layer of a module."""
    from svdit.quant.config import QuantConfig, Rule

    return QuantConfig((Rule("*", recipe_for(preset, rank=8)),))


def test_what_is_stored_is_int8(tmp_path: Path) -> None:
    quantized, output = tmp_path / "quantized.safetensors", tmp_path / "model.onnx"
    options = "--preset w8a8 --rank 4 --calib-images 4 --calib-steps 4 --no-figures --device cpu"
    command("quantize", ["--ckpt", "digits", "--output", str(quantized), *options.split()])
    command("export", [str(quantized), "--to", "onnx", "--output", str(output)])
    import onnx

    content = onnx.load(output)
    onnx.checker.check_model(content, full_check=True)
    assert output.stat().st_size < 1.1 * quantized.stat().st_size
    weights = [each for each in content.graph.initializer if each.name.endswith("residual_codes")]
    assert {each.data_type for each in weights} == {onnx.TensorProto.INT8} and len(weights) > 20
    properties = {each.key: each.value for each in content.metadata_props}
    assert json.loads(properties["config"])["hidden_size"] == load_model(quantized).config.hidden_size
    model = load_model(quantized)
    x, t, y = inputs(model)
    with torch.no_grad():
        assert relative(run(content, x, t.float(), y), model(x, t, y)) < 2e-3


@pytest.mark.parametrize("preset", ["w4a8", "w4a4", "fp8"])
def test_other_formats_are_a_sentence(preset: str, tmp_path: Path) -> None:
    model: DiT = small("dit")
    quantize_(model, dit_config(recipe_for(preset, rank=4)), calibration_loop(images=4, steps=4))
    with pytest.raises(UserError, match=r"has no form in ONNX that svdit writes; quantize with --preset w8a8"):
        onnx_model(model)


def test_a_graph_that_no_file_holds_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdit.export.graph.LARGEST", 1000)
    with pytest.raises(UserError, match=r"has 0\.0 GB, and an ONNX file 2 GB at most; export a quantized model"):
        onnx_model(small("dit"))
