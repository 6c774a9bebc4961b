"""`svdit export`: what each format contains, and what it refuses."""

from pathlib import Path

import pytest
import torch
from conftest import relative
from families import inputs, small

from svdit.checkpoints.store import load_model, save_model
from svdit.cli import command
from svdit.model.dit import DiT
from svdit.quant.config import dit_config, recipe_for
from svdit.quant.linear import quantized_layers
from svdit.quant.quantize import quantize_
from svdit.sampling.calibration import calibration_loop


def quantized(path: Path, family: str = "dit", preset: str = "w4a8") -> DiT:
    model = small(family)
    quantize_(model, dit_config(recipe_for(preset, rank=4)), calibration_loop(images=4, steps=4))
    save_model(model, path)
    return model


def export(*arguments: object) -> None:
    command("export", [*map(str, arguments)])


@pytest.mark.parametrize("preset", ["w4a8", "none"])
def test_diffusers_loads_the_folder(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from svdit.integrations.diffusers import published_timesteps_

    from diffusers import DiTTransformer2DModel  # isort: skip

    file, output = tmp_path / "model.safetensors", tmp_path / "folder"
    if preset == "none":
        model = small("dit")
        save_model(model, file)
    else:
        model = quantized(file, preset=preset)
    export(file, "--to", "diffusers", "--output", output)
    note = capsys.readouterr().err
    assert "1/127" in note and ("published_timesteps_(model)" in note) == (preset == "none")
    theirs, (x, t, y) = DiTTransformer2DModel.from_pretrained(output), inputs(model)
    assert bool(quantized_layers(theirs)) == (preset != "none")
    if preset == "none":  # what the note says; config.json does it for a quantized model
        published_timesteps_(theirs)
    with torch.no_grad():
        assert relative(theirs(x, t, y).sample, model(x, t, y)) < 2e-3  # products in another order can tip codes
        assert torch.equal(load_model(output)(x, t, y), model(x, t, y))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("family", "to", "name", "sentence"),
    [
        ("sit", "diffusers", "folder", "and this is a sit with prediction velocity; choose --to float"),
        ("dit", "onnx", "model.onnx", "quantize with --preset w8a8"),
        ("dit", "onnx", "model.pt", "model.pt"),
        ("dit", "float", "model.onnx", "model.onnx"),
        ("dit", "diffusers", "", "which exists; choose a new folder"),
    ],
)
def test_what_a_format_cannot_hold_is_a_sentence(
    family: str, to: str, name: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.safetensors"
    quantized(file, family)
    with pytest.raises(SystemExit, match="2"):
        export(file, "--to", to, "--output", tmp_path / name)
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_input_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.safetensors"
    quantized(file)
    before = file.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        export(file, "--to", "float", "--output", file)
    assert "--output" in capsys.readouterr().err and file.read_bytes() == before


def test_a_cache_plan_is_omitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = tmp_path / "cached.safetensors", tmp_path / "float.safetensors"
    options = "--speedup 1.5 --num-sampling-steps 4 --images 1 --device cpu"
    command("cache", ["digits", "--output", str(file), *options.split()])
    export(file, "--to", "float", "--output", output)
    assert "the cache plan is omitted" in capsys.readouterr().err
    assert load_model(file).cache_plan and not load_model(output).cache_plan


def test_a_dit_without_a_learned_variance_has_a_folder_too(tmp_path: Path) -> None:
    file, output = tmp_path / "model.safetensors", tmp_path / "folder"
    model = small("dit", learn_sigma=False)
    save_model(model, file)
    export(file, "--to", "diffusers", "--output", output)
    with torch.no_grad():
        assert torch.equal(load_model(output)(*inputs(model)), model(*inputs(model)))
