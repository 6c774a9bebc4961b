"""Measurements of `svdit quantize`'s report, and their bounded cost."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from svdit.checkpoints.store import save_model
from svdit.cli import command
from svdit.model.config import FAMILIES, DiTConfig
from svdit.model.dit import DiT
from svdit.model.zoo import DiT_models
from svdit.quant.config import QuantConfig, Rule, recipe_for
from svdit.quant.quantize import quantize_
from svdit.report import diagnose, page


def test_the_report_has_the_numbers_of_its_figures(tiny: DiT, tmp_path: Path) -> None:
    save_model(tiny, tmp_path / "tiny.safetensors")
    flags = "--preset w4a4 --calib-images 2 --calib-steps 2 --target-size 0.46 --skip blocks.1.*"
    output = tmp_path / "q.safetensors"
    command("quantize", ["--ckpt", str(tmp_path / "tiny.safetensors"), "--output", str(output), *flags.split()])
    assert output.stat().st_size <= 460_000
    figures = {path.stem for path in (tmp_path / "q.report").iterdir()}
    assert figures | {"spectra"} == {"layers", "timesteps", "spectra", "smoothing", "activations", "pareto"}
    report = json.loads((tmp_path / "q.report.json").read_text())
    measured, names = report["measured"], {layer["name"] for layer in report["layers"]}
    assert list(measured["errors"]) == ["conditional", "unconditional"]
    assert measured["timesteps"] == sorted(measured["timesteps"], reverse=True)
    for half in measured["errors"].values():
        assert set(half) == names
        assert all(len(row) == 10 and all(0 < error < 1 for error in row) for row in half.values())
    assert all(measured["sqnr"][layer["name"]] < layer["sqnr"] + 3 for layer in report["layers"] if layer["sqnr"])
    assert set(measured["smoothing"]) == {name for name in names if "adaLN" not in name}
    assert len(measured["activations"]) == 4
    sizes = [size for size, _ in measured["curve"]]
    assert sizes[0] <= measured["chosen"][0] <= 460_000 < sizes[-1]
    assert {(bits, rank) for bits, rank, _, _ in measured["uniform"]} >= {(2, 0), (4, 8), (8, 0)}
    assert all(sizes[0] <= size for _, _, size, _ in measured["uniform"])
    html = page.build([output]).html  # of a report that was not written by hand
    assert all(f'id="{part}"' in html for part in ("summary", "size", "layers", "time", "making"))
    assert f"{len(names)} layers</output>" in html


def test_without_guidance_there_are_no_unconditional_rows(tiny: DiT) -> None:
    original = copy.deepcopy(tiny)
    report = quantize_(tiny, QuantConfig((Rule("blocks.*", recipe_for("rtn")),)))
    measured = diagnose.measure(tiny, original, report.layers, 1.0, 0)
    assert list(measured["errors"]) == ["conditional"]
    errors = measured["errors"]["conditional"]["blocks.0.mlp.fc1"]
    assert measured["sqnr"]["blocks.0.mlp.fc1"] == pytest.approx(-10 * math.log10(sum(e**2 for e in errors) / 10))
    assert (measured["smoothing"], measured["spectra"]) == ({}, {})


def test_no_figures_leaves_no_trace(tiny: DiT, tmp_path: Path) -> None:
    save_model(tiny, tmp_path / "tiny.safetensors")
    paths = ["--ckpt", str(tmp_path / "tiny.safetensors"), "--output", str(tmp_path / "q.pt")]
    command("quantize", [*paths, "--rank-ratio", "0.5", "--no-figures"])
    assert json.loads((tmp_path / "q.report.json").read_text())["measured"] is None
    assert not (tmp_path / "q.report").exists()


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [("DiT-XL/2", 32, (1, 6)), ("DiT-XL/2", 64, (1, 4)), ("DiT-digits", 8, (8, 10)), ("JiT-B/16", 256, (1, 10))],
)
def test_the_work_is_bounded(name: str, size: int, expected: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = DiT_models[name](input_size=size)
    assert diagnose.affordable(model) == expected


def test_rows_are_grouped_by_timestep_and_half(tiny: DiT) -> None:
    keys = diagnose.time_and_half(tiny)(torch.empty(3), torch.tensor([0, 999, 999]), torch.tensor([4, 4, 5]))
    assert keys.tolist() == [0, 1998, 1999]
    table = diagnose.by_time({"a": {0: 0.1, 1998: 0.2, 1999: 0.3, 1: 0.4}}, tiny)
    assert table == {
        "time": "timesteps",
        "timesteps": [999, 0],
        "errors": {"conditional": {"a": [0.2, 0.1]}, "unconditional": {"a": [0.3, 0.4]}},
    }


@pytest.mark.parametrize(("family", "times"), [("sit", [0.0, 0.02, 1.0]), ("repa", [1.0, 0.02, 0.0])])
def test_times_of_a_flow_run_from_noise_to_data(family: str, times: list[float]) -> None:
    with torch.device("meta"):
        model = DiT(DiTConfig(depth=1, num_classes=5, **{"family": family, **FAMILIES[family]}))
    t, y = torch.tensor([0.02, 0.0, 1.0, 0.02]), torch.tensor([4, 4, 4, 5])
    keys = diagnose.time_and_half(model)(torch.empty(4), t, y).tolist()
    assert keys == [400, 0, 20_000, 401]
    table = diagnose.by_time({"a": {key: t / 100 for t, key in enumerate(keys)}}, model)
    assert (table["time"], table["timesteps"]) == (model.config.time, times)
    assert table["errors"]["unconditional"]["a"] == [None, 0.03, None]  # outside of the guidance interval
    assert None not in table["errors"]["conditional"]["a"]


@pytest.mark.parametrize("count", [1, 2, 199, 200, 201, 399, 16384])
def test_long_curves_are_thinned_with_their_ends_kept(count: int) -> None:
    curve = [(i, float(i)) for i in range(count)]
    thin = diagnose.thinned(curve)
    assert min(count, 100) <= len(thin) <= 200
    assert (thin[0], thin[-1]) == (curve[0], curve[-1])
    assert thin == sorted(set(thin))


def test_one_layer_of_each_kind() -> None:
    names = ["blocks.1.mlp.fc1", "blocks.0.mlp.fc1", "blocks.0.attn.qkv", "final_layer.linear"]
    assert diagnose.one_of_each_kind(names) == [names[0], names[2], names[3]]
