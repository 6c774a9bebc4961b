"""`svdit generate`: alone and under torchrun through its documented door, and the cross-check of --rank-ratio."""

import json
import os
import re
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from pixels import ROOT, TORCHRUN, saved

from svdit.checkpoints.store import load_model, save_model
from svdit.cli import command
from svdit.compat import apply_svd_to_dit
from svdit.files import sha256
from svdit.kernels import ops
from svdit.kernels.formats import Format
from svdit.pictures import setting
from svdit.quant.config import QuantConfig, Rule, recipe_for
from svdit.quant.linear import LinearSpec, rebuild_
from svdit.quant.quantize import quantize_

FAST = ["--num-sampling-steps", "3", "--device", "cpu"]


@pytest.fixture
def quantized(tmp_path: Path) -> str:
    model = apply_svd_to_dit(load_model(saved(tmp_path / "tiny.safetensors")), 0.5)
    path = tmp_path / "quantized.safetensors"
    save_model(model, path, provenance={"quantization": {"mode": "rank_ratio", "rank_ratio": 0.5}})  # type: ignore[arg-type]
    return str(path)


def test_alone_and_under_torchrun(tmp_path: Path, quantized: str, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["--ckpt", quantized, "--rank-ratio", "0.5", "--num-fid-samples", "5", "--image-size", "8", *FAST]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    command("generate", [*argv, "--sample-dir", str(alone), "--per-proc-batch-size", "3"])
    assert capfd.readouterr().out == f"5 images in {alone} and {alone}.npz\n"
    subprocess.run(
        [*TORCHRUN, str(ROOT / "sample_ddp.py"), *argv, "--sample-dir", str(shared)],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert capfd.readouterr().out.endswith(f"5 images in {shared} and {shared}.npz\n")  # gloo may print before
    one, two = (np.load(f"{folder}.npz")["arr_0"].astype(int) for folder in (alone, shared))
    assert one.shape == (5, 8, 8, 3)
    assert np.abs(one - two).max() <= 1
    manifest, other = (json.loads((folder / "manifest.json").read_text()) for folder in (alone, shared))
    by_run = {key: manifest.pop(key) for key in ("command", "manifest_sha256")}
    assert manifest == {key: value for key, value in other.items() if key not in by_run}
    assert by_run["command"] == shlex.join(
        ["svdit", "generate", *argv, "--sample-dir", str(alone), "--per-proc-batch-size", "3"]
    )
    assert other["command"] == shlex.join(["svdit", "generate", *argv, "--sample-dir", str(shared)])
    assert manifest["checkpoint"] == "quantized.safetensors"
    assert manifest["checkpoint_sha256"] == sha256(quantized)
    assert manifest["quantization"] == {"mode": "rank_ratio", "rank_ratio": 0.5}
    assert manifest["backend"] == ops.describe(ops.choose())
    assert manifest["cfg_scale"] == 1.5


@pytest.mark.parametrize(
    ("option", "files", "message"),
    [
        ("--tar", ["000000.tar", "manifest.json"], "2 images in {0} and {0}.npz"),
        ("--no-png", ["manifest.json"], "2 images in {0}.npz"),
    ],
)
def test_other_forms(
    tmp_path: Path, quantized: str, option: str, files: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    command("generate", ["--ckpt", quantized, "--num-fid-samples", "2", *FAST, "--sample-dir", str(folder), option])
    assert capsys.readouterr().out == message.format(folder) + "\n"
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") == files
    assert np.load(f"{folder}.npz")["arr_0"].shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    ("ckpt", "argv", "sentence"),
    [
        ("quantized", ["--rank-ratio", "0.95"], "--rank-ratio is 0.95, but {ckpt} was quantized with 0.5"),
        ("tiny", ["--rank-ratio", "0.5"], "--rank-ratio is 0.5, but {ckpt} is not quantized"),
        ("quantized", ["--image-size", "4"], "--image-size is 4, but {ckpt} generates 8×8 images"),
        ("quantized", ["--num-sampling-steps", "ddim300"], "no stride selects 300 of 1000 timesteps"),
        ("quantized", ["--sample-dir", "{ckpt}/set"], "cannot write into the folder {ckpt}"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, quantized: str, ckpt: str, argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = str(Path(quantized).with_stem(ckpt)), tmp_path / "set"
    argv = ["--num-fid-samples", "2", *FAST, *(part.format(ckpt=path) for part in argv)]
    with pytest.raises(SystemExit) as exit_:
        command("generate", ["--ckpt", path, "--sample-dir", str(folder), *argv])
    assert exit_.value.code == 2
    *notes, message = capsys.readouterr().err.splitlines()
    assert message.startswith("svdit generate: ")
    assert sentence.format(ckpt=path) in message
    assert all(line.startswith("note: ") for line in notes)
    assert not folder.exists()


def test_under_torchrun_a_mistake_is_printed_once_and_every_process_exits_with_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [*TORCHRUN, str(ROOT / "sample_ddp.py"), "--ckpt", "missing.pt", *FAST],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("missing.pt") == 1
    assert done.stderr.count("svdit generate: ") == 1
    assert re.findall(r"exitcode +: (-?\d+)", done.stderr) == ["2", "2"]
    assert done.stderr.count("Traceback") == 1  # torchrun's own
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_checked_before_the_checkpoint_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        command("generate", ["--ckpt", "missing.pt", "--sample-dir", str(tmp_path / "file" / "set"), *FAST])
    assert f"cannot write into the folder {tmp_path}/file (File exists); " in capsys.readouterr().err


def test_another_command_continues_a_set(tmp_path: Path, quantized: str) -> None:
    """Commands may differ in what does not change images; the manifest has the last one."""
    argv = ["--ckpt", quantized, "--sample-dir", str(tmp_path / "set"), *FAST]
    command("generate", [*argv, "--num-fid-samples", "2"])
    command("generate", [*argv, "--num-fid-samples", "3", "--per-proc-batch-size", "1"])
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["num_images"] == 3
    assert manifest["command"].endswith("--num-fid-samples 3 --per-proc-batch-size 1")


def test_a_file_quantized_from_python_is_not_full_precision(tmp_path: Path) -> None:
    model = load_model(saved(tmp_path / "tiny.safetensors"))
    quantize_(model, QuantConfig((Rule("*", recipe_for("rtn")),)))
    save_model(model, tmp_path / "q.safetensors")
    for name in ("tiny", "q"):
        argv = ["--ckpt", f"{tmp_path / name}.safetensors", "--sample-dir", str(tmp_path / name), *FAST]
        command("generate", [*argv, "--num-fid-samples", "1"])
    records = [json.loads((tmp_path / name / "manifest.json").read_text())["quantization"] for name in ("tiny", "q")]
    assert records == [None, {"mode": "unrecorded"}]
    assert [setting(record) for record in records] == ["full precision", "quantized"]


def test_a_rank_ratio_needs_a_quantized_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("generate", ["--rank-ratio", "0.5", *FAST])
    assert "the published weights are not quantized" in capsys.readouterr().err


def test_a_file_quantized_otherwise_has_no_rank_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(saved(tmp_path / "tiny.safetensors"))
    rebuild_(model, {"blocks.0.mlp.fc1": asdict(LinearSpec(weight=Format(8)))})
    save_model(model, tmp_path / "w8.safetensors")
    with pytest.raises(SystemExit):
        command("generate", ["--ckpt", str(tmp_path / "w8.safetensors"), "--rank-ratio", "0.5", *FAST])
    assert "was quantized without a rank ratio" in capsys.readouterr().err
