"""`svdit quantize` of a model of every family: presets, reload, verify, resume, and the report's times."""

import json
import sys
from itertools import cycle
from pathlib import Path

import pytest
import torch
from families import VARIANTS, small

from svdit.checkpoints.store import load_model, read_header, save_model
from svdit.cli import command
from svdit.quant import quantize as module
from svdit.quant.config import RECIPES
from svdit.quant.linear import quantized_layers
from svdit.quant.solve import quantize_linear

QUICK = ("--calib-images", "2", "--calib-steps", "3")
SAMPLERS = {"dit": "ddim", "sit": "sde", "repa": "sde", "lightningdit": "euler", "jit": "heun"}


def checkpoint(family: str, folder: Path) -> Path:
    """A file of a small model, of as few blocks as have all of its family's parts."""
    path = folder / f"{family}.safetensors"
    save_model(small(family, depth=1 + (family == "jit"), mlp_ratio=2.0), path)
    return path


def quantize(source: Path, output: Path, *flags: str) -> Path:
    command("quantize", ["--ckpt", str(source), "--output", str(output), *flags])
    return output


@pytest.mark.parametrize(("preset", "family"), list(zip(RECIPES, cycle(VARIANTS), strict=False)))
@torch.no_grad()
def test_every_preset_and_family_is_quantized_reloaded_and_verified(preset: str, family: str, tmp_path: Path) -> None:
    source, rank = checkpoint(family, tmp_path), ["--rank", "4"] * (RECIPES[preset].low_rank != "none")
    output = quantize(source, tmp_path / "q.safetensors", "--preset", preset, *QUICK, *rank, "--no-figures")
    model, original = load_model(output), load_model(source)
    assert model.config == original.config and len(quantized_layers(model)) == 5 * model.config.depth + 1
    x, y = torch.randn(2, *model.input_shape), torch.tensor([0, 5])
    t = torch.tensor([0.3, 1.0]) if model.config.is_flow else torch.tensor([3, 999])
    assert 0 < float((model(x, t, y) - original(x, t, y)).norm()) < 0.5 * float(original(x, t, y).norm())
    command("verify", [str(output), "--against", str(source)])


def test_the_last_block_before_pixels_has_8_bits(tmp_path: Path) -> None:
    output = quantize(
        checkpoint("jit", tmp_path), tmp_path / "q.safetensors", "--preset", "w4a8", *QUICK, "--no-figures"
    )
    header = read_header(output)
    bits = {name: spec["weight"]["bits"] for name, spec in header["layers"].items() if "adaLN" not in name}
    assert set(bits.values()) == {4, 8}
    assert {name for name in bits if bits[name] == 8} == {name for name in bits if name.startswith("blocks.1.")}
    assert header["provenance"]["quantization"]["last_block"]["weight"]["bits"] == 8


@pytest.mark.parametrize("family", ["repa", "jit"])
def test_an_interrupted_run_resumes_with_the_same_bits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, flags, solved = checkpoint(family, tmp_path), (*QUICK, "--no-figures"), list[str]()
    whole = quantize(source, tmp_path / "whole.safetensors", *flags)

    def dies_at_the_third(name: str, *rest: object) -> object:
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(name)
        return quantize_linear(name, *rest)  # type: ignore[arg-type]

    output = tmp_path / "q.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(module, "quantize_linear", dies_at_the_third)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            quantize(source, output, *flags)
    assert not output.exists() and len(list((tmp_path / "q.safetensors.partial").iterdir())) == 2
    quantize(source, output, *flags)
    assert output.read_bytes() == whole.read_bytes()


def test_layers_of_another_configuration_are_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here of the same weights: options name what the file does not record."""
    source, runs = tmp_path / "bare.pt", set[str]()
    torch.save(small("jit", depth=2).state_dict(), source)

    def stops(*args: object, run_id: str, **options: object) -> None:
        runs.add(run_id)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "quantize_", stops)
    for block in ("0", "1", "1"):
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            quantize(source, tmp_path / "q.safetensors", "--context-start", block, "--preset", "rtn", "--no-figures")
    assert len(runs) == 2


@pytest.mark.parametrize("family", VARIANTS)
def test_the_report_has_the_times_of_the_familys_own_trajectories(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # figures are measured, but not drawn
    source, flags = checkpoint(family, tmp_path), ("--preset", "w4a4", "--skip", "blocks.*.attn.*", *QUICK)
    output = quantize(source, tmp_path / "q.safetensors", *flags)
    measured = json.loads(output.with_suffix(".report.json").read_text())["measured"]
    config = load_model(output).config
    assert measured["time"] == config.time
    times = measured["timesteps"]
    assert times == sorted(times, reverse=config.time != "noise_to_data")
    assert not config.is_flow or (0 <= min(times) <= 0.1 and 0.7 < max(times) <= 1)
    for half in measured["errors"].values():
        assert all(0 < error < 1 for row in half.values() for error in row if error is not None)
    recorded = (read_header(output) or {})["provenance"]["quantization"]["calibration"]
    assert recorded["sampler"] == SAMPLERS[family]
