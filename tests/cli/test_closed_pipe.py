"""`svdit … | head -1`: results are on disk before anything is printed, and a closed pipe ends a command quietly."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
from pixels import ROOT, saved

from svdit.cli import command
from svdit.training.monitor import read_curve


@contextmanager
def closed_stdout() -> Iterator[None]:
    """Replace stdout by a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file, redirect_stdout(file):
        yield


QUANTIZE = "quantize --ckpt {tiny} --output {folder}/q.safetensors --rank-ratio 0.5 --device cpu"
FAST = "--num-sampling-steps 2 --device cpu"
TRAIN = "train --data digits --model DiT-digits --steps 2 --log-every 1 --global-batch-size 2 --num-workers 0"


@pytest.mark.parametrize(
    ("argv", "results"),
    [
        (QUANTIZE, "q.safetensors q.report.json q.report/layers.png q.report/timesteps.png"),
        (f"sample --ckpt {{tiny}} --output {{folder}}/a.png {FAST}", "a.png"),
        (f"generate --ckpt {{tiny}} --sample-dir {{folder}}/set --num-fid-samples 2 {FAST}", "set/000001.png set.npz"),
        (f"{TRAIN} --device cpu --results-dir {{folder}}/run", "run/ema.safetensors run/last.pt run/loss.png"),
        ("inspect {tiny}", ""),
    ],
    ids=lambda text: text.split()[0] if text else "",
)
def test_results_are_saved_before_anything_is_printed(
    argv: str, results: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("svdit.training.loop.sample_grid", lambda *arguments: None)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: path.touch())
    tiny = saved(tmp_path / "tiny.safetensors")
    name, *rest = argv.format(tiny=tiny, folder=tmp_path).split()
    with closed_stdout(), pytest.raises(SystemExit) as stop:
        command(name, rest)
    assert stop.value.code == 1
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == (name == "quantize")
    assert all(error.startswith("warning: 9 of 9 layers in fp32") for error in errors)
    assert [path for path in results.split() if not (tmp_path / path).exists()] == []
    assert not list(tmp_path.glob("*.partial"))
    if name == "quantize":
        assert len(json.loads((tmp_path / "q.report.json").read_text())["layers"]) == 9
    if name == "train":  # it continues to the last step
        assert [row["step"] for row in read_curve(tmp_path / "run" / "loss.csv")] == ["1", "2"]


def test_a_long_output_ends_quietly_too(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Python drops what does not fit its buffer, so that no later write fails."""
    monkeypatch.setattr("svdit.cli.result.Result.print", lambda result, args: print("x" * 100_000))
    with closed_stdout(), pytest.raises(SystemExit) as stop:
        command("inspect", ["digits"])
    assert (stop.value.code, capfd.readouterr().err) == (1, "")


@pytest.mark.parametrize("argv", ["--version", "--help", "quantize --help"])
def test_the_interpreter_exits_without_an_error_message(argv: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "from svdit.cli import main; main()"
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}  # argparse hides the error of an unbuffered write
    done = subprocess.run(
        [sys.executable, "-c", code, *argv.split()],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")
