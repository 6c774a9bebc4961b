"""`svdit cache`: the plan in the file, followed, ignored with one sentence, shown, and known to the metrics."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pixels import pixel_model

from svdit.checkpoints.io import contents, write
from svdit.checkpoints.store import load_model, locate, read_header, save_model
from svdit.cli import command
from svdit.errors import UserError
from svdit.model.caching import CachePlan

STEPS = ["--sampler", "ddim", "--num-sampling-steps", "4", "--cfg-scale", "2", "--device", "cpu"]


SOURCE = locate("digits")


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cached") / "cached.safetensors"
    command("cache", ["digits", "--speedup", "2", "--images", "1", *STEPS, "--output", str(output), "--quiet"])
    return output


def sampled(checkpoint: Path, folder: Path, *options: str) -> np.ndarray:
    argv = ["--ckpt", str(checkpoint), "--classes", "1", "--output", str(folder / "a.png"), *STEPS, *options]
    command("sample", argv)
    return np.asarray(Image.open(folder / "a.png"))


def test_the_plan_is_in_the_file_and_all_else_is_the_same(cached: Path) -> None:
    a, b = contents(SOURCE), contents(cached)
    assert a.header and b.header and all((a.tensors[name] == b.tensors[name]).all() for name in a.tensors | b.tensors)
    assert set(b.header) - set(a.header) == {"caching"} and a.header["provenance"] == b.header["provenance"]
    plan = load_model(cached).cache_plan
    assert plan and plan.record["speedup"] >= 2 and plan.sampling["cfg_scale"] == 2 and len(plan.runs[0]) == 4
    assert load_model(SOURCE).cache_plan is None


def test_samplers_follow_it_with_the_same_settings_only(
    cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, followed = sampled(SOURCE, tmp_path), sampled(cached, tmp_path, "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["caching"]["speedup"] >= 2
    assert not np.array_equal(whole, followed)
    assert np.array_equal(whole, sampled(cached, tmp_path, "--no-cache"))
    others = sampled(SOURCE, tmp_path, "--num-sampling-steps", "5")
    capsys.readouterr()
    assert np.array_equal(others, sampled(cached, tmp_path, "--num-sampling-steps", "5"))
    assert "the cache plan is not followed: it is for steps 4, not 5" in capsys.readouterr().err


def test_inspect_shows_it(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("inspect", [str(cached)])
    out, plan = capsys.readouterr().out, load_model(cached).cache_plan
    assert plan and "caching: for ddim 4, guidance 2.0\nspeedup: " in out
    assert f" to 5: {plan.runs[-1].replace('0', '.').replace('1', '#')}\n" in out
    command("inspect", [str(cached), "--json"])
    assert json.loads(capsys.readouterr().out)["caching"]["runs"] == list(plan.runs)


def test_quantizing_omits_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, model = tmp_path / "q.safetensors", pixel_model()
    model.cache_plan = CachePlan((0,), ("10",), (((1.0, 0.0),),))
    cached = tmp_path / "cached.safetensors"
    save_model(model, cached)
    assert load_model(cached).cache_plan == model.cache_plan
    options = ["--calib-images", "2", "--calib-steps", "3", "--no-figures", "--rank", "4"]
    command("quantize", ["--ckpt", str(cached), "--output", str(output), *options])
    assert "the cache plan is omitted" in capsys.readouterr().err
    assert "caching" not in (read_header(output) or {})


def test_the_metrics_know_it(cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, checkpoint in (("whole", SOURCE), ("cached", cached)):
        folder = ["--sample-dir", str(tmp_path / name), "--num-fid-samples", "3"]
        command("generate", ["--ckpt", str(checkpoint), *STEPS, *folder])
    for name in ("whole", "cached"):
        places = ["--fake_dir", str(tmp_path / name), "--paired_dir", str(tmp_path / "whole")]
        command("evaluate", [*places, "--metrics", "paired", "--output", str(tmp_path / f"{name}-metrics")])
    files = [tmp_path / f"{name}-metrics" / "metrics.json" for name in ("whole", "cached")]
    first, second = (json.loads(file.read_text())["protocol"]["sample_caching"] for file in files)
    assert first is None and second["speedup"] >= 2
    capsys.readouterr()
    command("compare", list(map(str, files)))
    pattern = r"cached-metrics was sampled with feature caching: speedup [0-9.]+, sha256 [0-9a-f]{16}\.\n"
    assert re.search(pattern, capsys.readouterr().out)


def test_plans_in_files_are_checked(cached: Path, tmp_path: Path) -> None:
    tensors, header, _ = contents(cached)
    for caching in ({}, {"groups": [0, 9], "runs": ["1", "1"], "coefficients": [[], []]}, {"groups": 3}):
        file = tmp_path / "bad.safetensors"
        write(file, tensors, {**(header or {}), "caching": caching})
        with pytest.raises(UserError, match=r"bad.safetensors has an unusable cache plan .*; run `svdit cache` on it"):
            load_model(file)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--speedup", "0.5"], "argument --speedup: '0.5' is not a number of at least 1"),
        (["--speedup", "50"], "a speed-up of 50 is too high; the maximum is 4"),
    ],
)
def test_mistakes(options: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command("cache", [str(SOURCE), *STEPS, "--images", "1", "--output", str(tmp_path / "o.safetensors"), *options])
    assert line in capsys.readouterr().err
    assert not (tmp_path / "o.safetensors").exists()
