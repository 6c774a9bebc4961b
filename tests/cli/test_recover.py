"""`svdit recover`: what it changes in a file and records, and runs that are interrupted."""

import json
from pathlib import Path

import pytest
import torch
from pixels import pixel_model

from svdit.checkpoints.io import contents
from svdit.checkpoints.store import load_model, save_model
from svdit.cli import command
from svdit.files import sha256
from svdit.model.config import FLOW
from svdit.recovery import loop

STEPS = 40


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images and calls."""
    for name, value in {"IMAGES": 8, "WALKS": 4, "STEPS": (4, 5), "ROWS": 32, "EVERY": 10}.items():
        monkeypatch.setattr(loop, name, value)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A flow of latents, whose range is not clipped, in full precision and quantized."""
    folder = tmp_path_factory.mktemp("recover")
    source, file = folder / "source.safetensors", folder / "quantized.safetensors"
    save_model(pixel_model(in_channels=4, family="sit", **FLOW), source, name="tiny")
    options = "--preset w4a8 --rank 4 --calib-images 4 --calib-steps 4 --no-figures --device cpu"
    command("quantize", ["--ckpt", str(source), "--output", str(file), *options.split()])
    return source, file


def recover(files: tuple[Path, Path], output: Path, *options: str) -> None:
    source, file = files
    options = ("--steps", str(STEPS), "--device", "cpu", *options)
    command("recover", [str(file), "--against", str(source), "--output", str(output), *options])


@pytest.fixture(scope="module")
def recovered(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("recovered") / "recovered.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"IMAGES": 8, "WALKS": 4, "STEPS": (4, 5), "ROWS": 32, "EVERY": 10}.items():
            patch.setattr(loop, name, value)
        recover(files, output, "--quiet")
    return output


def test_only_floats_of_quantized_layers_change(files: tuple[Path, Path], recovered: Path) -> None:
    before, after = contents(files[1]), contents(recovered)
    assert before.header and after.header and before.header["layers"] == after.header["layers"]
    assert before.tensors.keys() == after.tensors.keys()
    changed = {name for name, tensor in after.tensors.items() if not torch.equal(tensor, before.tensors[name])}
    parts = {name.rpartition(".")[2] for name in changed}
    assert parts == {"l1", "l2", "bias", "residual_steps", "residual_scales"}
    for name in changed:
        assert name.rpartition(".")[0] in after.header["layers"]
        assert after.tensors[name].dtype == before.tensors[name].dtype and after.tensors[name].dtype.is_floating_point
    assert abs(recovered.stat().st_size - files[1].stat().st_size) < 8192  # of the header


def test_images_come_nearer_and_the_report_says_so(recovered: Path) -> None:
    report = json.loads(recovered.with_suffix(".recovery.json").read_text())
    assert report["after"]["psnr"] > report["before"]["psnr"] + 0.3
    assert report["after"]["pooled"] > report["before"]["pooled"] + 0.3
    assert [point["step"] for point in report["curve"]] == list(range(0, STEPS + 1, 10))
    assert recovered.with_suffix(".recovery.png").stat().st_size > 5000
    assert list(recovered.parent.glob("*.partial")) == []


def test_the_file_records_it_and_is_verified(
    files: tuple[Path, Path], recovered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("inspect", [str(recovered)])
    assert "recovery.after: psnr=" in capsys.readouterr().out
    command("inspect", [str(recovered), "--json"])
    record = json.loads(capsys.readouterr().out)["provenance"]["recovery"]
    report = json.loads(recovered.with_suffix(".recovery.json").read_text())
    assert record["sha256"] == sha256(files[1])
    assert record["steps"] == report["steps"] > 0 and record["after"] == report["after"]
    command("verify", [str(recovered), "--against", str(files[0])])
    assert "6 quantized layers match the record" in capsys.readouterr().out
    model = load_model(recovered)
    provenance = contents(recovered).header["provenance"]  # type: ignore[index]
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias.copy_(model.blocks[0].mlp.fc1.bias.flip(0))
    save_model(model, recovered.with_name("changed.safetensors"), provenance=provenance)
    with pytest.raises(SystemExit, match="2"):
        command("verify", [str(recovered.with_name("changed.safetensors")), "--against", str(files[0])])
    assert "the bias of blocks.0.mlp.fc1" in capsys.readouterr().err


def test_an_interrupted_run_resumes_with_the_same_file(
    files: tuple[Path, Path], recovered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, step = [], loop.training_step

    def interrupted(*args: object) -> float:
        taken.append(1)
        if len(taken) == 25:
            raise KeyboardInterrupt
        return step(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "training_step", interrupted)
    output = tmp_path / "recovered.safetensors"
    with pytest.raises(SystemExit, match="130"):
        recover(files, output)
    assert not output.exists() and (tmp_path / f"{output.name}.partial" / "recovery.pt").exists()
    recover(files, output)
    assert len(taken) == 25 + STEPS - 20  # from the last measurement on
    assert sha256(output) == sha256(recovered)


def test_a_cache_plan_is_omitted(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, file = files
    cached, output = tmp_path / "cached.safetensors", tmp_path / "recovered.safetensors"
    options = "--speedup 1.5 --sampler euler --num-sampling-steps 6 --images 1 --device cpu"
    command("cache", [str(file), "--output", str(cached), *options.split()])
    assert load_model(cached).cache_plan
    recover((source, cached), output, "--steps", "1")
    assert "the cache plan is omitted" in capsys.readouterr().err
    assert load_model(output).cache_plan is None
