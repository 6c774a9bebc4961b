"""`svdit evaluate`, `compare` and `selftest` from the command line: flags, tables, files, exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Means
from PIL import Image

from svdit.cli import command, evaluate
from svdit.evaluation import inception
from svdit.kernels.cpu.features import processor


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inception, "random_extractor", Means)
    monkeypatch.delenv("SVDIT_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def folder(path: Path, n: int, seed: int, **manifest: object) -> str:
    path.mkdir()
    for i, image in enumerate(np.random.RandomState(seed).randint(0, 256, (n, 12, 12, 3)).astype(np.uint8)):
        Image.fromarray(image).save(path / f"{i:03d}.png")
    (path / "manifest.json").write_text(json.dumps({"tool": "svdit", "seed": 0, "steps": 20} | manifest))
    return str(path)


def run(*argv: str) -> int:
    """The exit code."""
    try:
        command(argv[0], list(argv[1:]))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def flags(tmp_path: Path) -> list[str]:
    return ["--feature-extractor", "random", "--cache-dir", str(tmp_path / "cache")]


def test_documented_flags_with_underscores_and_with_dashes():
    for dash in "_-":
        names = [f"--{name}{dash}{'images' if name == 'num' else 'dir'}" for name in ("real", "fake", "num")]
        args = evaluate.parser().parse_args([names[0], "r", names[1], "f", names[2], "5"])
        assert (args.real_dir, args.fake_dir, args.num_images) == ("r", "f", 5)


@pytest.mark.parametrize("name", ["evaluate", "compare", "selftest"])
def test_help_does_not_import_torch(name: str):
    code = f"import sys; from svdit.cli.{name} import parser; parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_and_table_of_two_sets_then_their_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    real, full, fake = (folder(tmp_path / name, 12, i) for i, name in enumerate(("real", "full", "w4")))
    for each in (full, fake):
        target = str(tmp_path / f"out_{Path(each).name}")
        common = ["--real_dir", real, "--fake_dir", each, "--paired_dir", full, "--output", target]
        assert run("evaluate", *common, *flags(tmp_path)) == 0
    output = capsys.readouterr().out
    for part in ("random_fid", "NOT comparable", "psnr", "12 generated images of", "no random_fid_inf", "± se"):
        assert part in output
    assert sorted(p.name for p in (tmp_path / "out_w4").iterdir()) == [
        "grid_fake.png", "grid_pairs.png", "metrics.json", "metrics.md",
    ]  # fmt: skip
    metrics = json.loads((tmp_path / "out_w4" / "metrics.json").read_text())
    assert metrics["protocol"]["sample_steps"] == 20
    assert f"{processor()}, " in metrics["versions"]["machine"]
    assert metrics["command"].startswith("svdit evaluate --real") and str(tmp_path / "out_w4") in metrics["command"]
    assert run("compare", str(tmp_path / "out_full"), str(tmp_path / "out_w4")) == 0
    assert "paired by seed" in capsys.readouterr().out


def test_different_protocols_end_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    real, a, b = (
        folder(tmp_path / "real", 12, 0),
        folder(tmp_path / "a", 12, 1),
        folder(tmp_path / "b", 12, 2, steps=50),
    )
    for each in (a, b):
        run("evaluate", "--real_dir", real, "--fake_dir", each, "--output", each + "_out", *flags(tmp_path))
    capsys.readouterr()
    assert run("compare", a + "_out", b + "_out") == 2
    assert "differ in sample_steps: 20 against 50" in capsys.readouterr().err
    assert run("compare", a + "_out", b + "_out", "--force") == 0
    assert "not comparable" in capsys.readouterr().out


def test_second_set_adds_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    real, full, fake = (folder(tmp_path / name, 12, i) for i, name in enumerate(("real", "full", "w4")))
    assert run("evaluate", "--real_dir", real, "--fake_dir", fake, "--compare_dir", full, *flags(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["metric", "value", "±", "se", "debiased", "second", "difference", "±", "se"]
    assert max(map(len, lines[:18])) <= 80


def test_pairs_alone_need_neither_weights_nor_real_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    full, fake = folder(tmp_path / "full", 5, 0), folder(tmp_path / "fake", 5, 1)
    output = tmp_path / "report"
    assert (
        run("evaluate", "--fake_dir", fake, "--paired_dir", full, "--metrics", "paired", "--output", str(output)) == 0
    )
    printed = capsys.readouterr().out
    assert "psnr" in printed and "NOT comparable" not in printed
    assert not {"resize", "precision", "extractor"} & set(
        re.findall(r"^- (\w+):", (output / "metrics.md").read_text(), re.M)
    )
    idle = [
        "--feature-extractor",
        "random",
        "--download",
        "--cache-dir",
        str(tmp_path / "no"),
        "--allow-fewer",
        "--seed",
        "9",
    ]
    assert run("evaluate", "--fake_dir", fake, "--paired_dir", full, "--metrics", "paired", *idle) == 0
    err = capsys.readouterr().err
    for option in ("--feature-extractor", "--download", "--cache-dir"):
        assert f"note: {option} has no effect: these metrics need no network" in err
    for option in ("--allow-fewer", "--seed"):
        assert f"note: {option} has no effect without --num_images" in err


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--cache-dir", "CACHE"], "need the 2015 Inception weights (95.6 MB), which are in none of"),
        (["--cache-dir", "CACHE", "--output", "NEW"], "need the 2015 Inception weights"),
        (["--metrics", "fidd", "--feature-extractor", "random"], "there is no metric 'fidd'"),
        (["--num_images", "99", "--feature-extractor", "random"], "contains 5 images, fewer than the 99 requested"),
        (["--num_images", "0", "--feature-extractor", "random"], "'0' is not an integer from 1"),
        (["--device", "tpu9", "--feature-extractor", "random"], "device 'tpu9' is not supported"),
        (["--metrics", "lpips", "--cache-dir", ""], "LPIPS needs"),
        (["--metrics", "fid", "--paired_dir", "x"], "--paired_dir has no effect on --metrics fid; add paired"),
        (["--metrics", "paired", "--save-stats", "x"], "--save-stats has no effect on --metrics paired"),
        (["--feature-extractor", "random", "--feature-extractor-weights", "x"], "has no effect on"),
        (["--seed", "-1"], "'-1' is not an integer from 0 to 4294967295"),
        (["--output", "FILE", "--feature-extractor", "random"], "cannot write into the folder"),
        (["--save-stats", "FILE/stats.npz", "--feature-extractor", "random"], "cannot write into the folder"),
        (["--cache-dir", "FILE", "--feature-extractor", "random"], "cannot write into the folder"),
    ],
)
def test_user_errors_end_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], sentence: str
):
    real, fake = folder(tmp_path / "real", 5, 0), folder(tmp_path / "fake", 5, 1)
    (tmp_path / "file").touch()
    places = {
        "CACHE": str(tmp_path),
        "NEW": str(tmp_path / "new"),
        "FILE": str(tmp_path / "file"),
        "FILE/stats.npz": str(tmp_path / "file" / "x.npz"),
    }
    extra = [places.get(word, word) for word in extra]
    assert run("evaluate", "--real_dir", real, "--fake_dir", fake, *extra) == 2
    message = capsys.readouterr().err
    assert message.startswith("svdit evaluate: ")
    assert sentence in message
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("home", ["file", "~"])  # where no folder can be made, and nobody's
def test_without_a_usable_home_features_are_not_kept(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(
        os.path, "expanduser", lambda path: str(path).replace("~", str(tmp_path / home), home == "file")
    )
    real, fake = folder(tmp_path / "real", 5, 0), folder(tmp_path / "fake", 5, 1)
    assert run("evaluate", "--real_dir", real, "--fake_dir", fake, "--feature-extractor", "random") == 0
    assert "cannot hold the features, which are not kept" in capsys.readouterr().err
    assert not (tmp_path / "~").exists()


def test_features_are_kept_in_the_cache_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    real, fake = folder(tmp_path / "real", 5, 0), folder(tmp_path / "fake", 5, 1)
    assert run("evaluate", "--real_dir", real, "--fake_dir", fake, "--feature-extractor", "random") == 0
    assert len(list((tmp_path / "caches" / "svdit" / "features").glob("*/statistics.npz"))) == 2


def test_an_unavailable_named_metric_ends_with_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    real, fake = folder(tmp_path / "real", 5, 0), folder(tmp_path / "fake", 5, 1)
    assert run("evaluate", "--real_dir", real, "--fake_dir", fake, "--metrics", "fid,prc", *flags(tmp_path)) == 1
    assert "requested but unavailable: prc" in capsys.readouterr().err


def test_selftest_needs_both_adm_files(capsys: pytest.CaptureFixture[str]):
    assert run("selftest", "--adm-samples", "x.npz") == 2
    assert "pass --adm-reference together with it" in capsys.readouterr().err


def test_selftest_weights_need_the_adm_files(capsys: pytest.CaptureFixture[str]):
    assert run("selftest", "--feature-extractor-weights", "x.pth") == 2
    assert "no effect without --adm-samples" in capsys.readouterr().err


def test_results_are_saved_when_the_reader_of_the_pipe_is_gone(tmp_path: Path):
    """As in `svdit evaluate … | head -1`, with a reader that has gone before the first line."""
    full, fake = folder(tmp_path / "full", 5, 0), folder(tmp_path / "fake", 5, 1)
    argv = ["evaluate", "--fake_dir", fake, "--paired_dir", full, "--metrics", "paired", "--output", f"{tmp_path}/out"]
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; from svdit.cli import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *argv], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]["psnr"]["value"] > 0


def test_each_process_uses_its_own_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """torch.cuda.set_device refuses a device without an index."""
    fake = folder(tmp_path / "fake", 5, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    devices = []

    def session(device: torch.device) -> None:
        devices.append(device)
        raise KeyboardInterrupt

    monkeypatch.setattr("svdit.distributed.session", session)
    for flags in ([], ["--device", "cuda"]):
        assert run("evaluate", "--fake_dir", fake, "--paired_dir", fake, "--metrics", "paired", *flags) == 130
    assert devices == [torch.device("cuda", 3)] * 2


def test_evaluation_modules_import_without_the_optional_packages():
    code = """
import sys
for name in ("scipy", "torch_fidelity", "torchvision"):
    sys.modules[name] = None
import pkgutil, importlib, svdit.evaluation
for module in pkgutil.iter_modules(svdit.evaluation.__path__):
    importlib.import_module(f"svdit.evaluation.{module.name}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["scipy", "torch_fidelity"])
def test_a_missing_optional_package_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str
):
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    real, fake = folder(tmp_path / "real", 5, 0), folder(tmp_path / "fake", 5, 1)
    assert run("evaluate", "--real_dir", real, "--fake_dir", fake, *flags(tmp_path)) == 2
    assert "pip install 'svdit[eval]'" in capsys.readouterr().err
