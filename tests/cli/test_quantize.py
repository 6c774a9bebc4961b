"""`svdit quantize`: files of the size their formats imply, reports written before they are printed, errors."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

from svdit import __version__
from svdit.checkpoints.io import fingerprint
from svdit.checkpoints.store import load_model, read_header, save_model
from svdit.cli import command
from svdit.kernels.cpu.features import processor
from svdit.model.dit import DiT
from svdit.quant.linear import quantized_layers
from svdit.runtime.accelerate import accelerate
from svdit.sampling.calibration import calibration_sampling
from svdit.sampling.fidelity import Fidelity
from svdit.sampling.numbers import COMPARED

FEW = ["--calib-images", "4", "--calib-steps", "3"]
QUICK = [*FEW, "--rank", "4"]


CLASSES = ("a", "b", "c", "d", "e")


@pytest.fixture
def checkpoint(tiny: DiT, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    tiny.class_names = CLASSES
    save_model(tiny, path)
    return path


def quantize(checkpoint: Path, *flags: str, name: str = "q.safetensors") -> Path:
    output = checkpoint.with_name(name)
    command("quantize", ["--ckpt", str(checkpoint), "--output", str(output), "--no-figures", *flags])
    return output


def test_the_documented_mode(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = quantize(checkpoint, "--rank-ratio", "0.95", "--num-bits", "8", name="quantized_model.pt")
    header = read_header(output)
    assert header is not None
    mode = {"mode": "rank_ratio", "rank_ratio": 0.95, "num_bits": 8, "whiten": False}
    assert header["provenance"]["quantization"].items() >= mode.items()
    assert {layer.spec.rank_ratio for layer in quantized_layers(load_model(output)).values()} == {0.95}
    assert load_model(output).class_names == CLASSES
    printed = capsys.readouterr()
    assert "warning: in 14 of 14 layers the two factors have more elements than the weight" in printed.err
    assert "MB before" in printed.out
    report = json.loads(output.with_suffix(".report.json").read_text())
    assert len(report["layers"]) == 14
    words = ["svdit", "quantize", "--ckpt", str(checkpoint), "--output", str(output), "--no-figures", "--rank-ratio"]
    assert shlex.split(report["command"]) == [*words, "0.95", "--num-bits", "8"]
    assert report["source"] == {"file": "tiny.safetensors", "sha256": fingerprint(checkpoint)}
    assert (report["model"], report["versions"]) == ("", f"svdit {__version__}, torch {torch.__version__}")
    assert report["kept"] == ["x_embedder.proj", "y_embedder.embedding_table"]
    assert f"{processor()}, " in report["machine"]
    assert not list(checkpoint.parent.glob("*.partial"))


@pytest.mark.parametrize("preset", ["w8a8", "w4a4", "svdquant"])
def test_a_preset_reloads_bit_exactly_with_the_size_its_formats_imply(checkpoint: Path, preset: str) -> None:
    output = quantize(checkpoint, "--preset", preset, *QUICK)
    model = load_model(output)
    again = checkpoint.with_name("again.safetensors")
    save_model(model, again)
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([3, 700]), torch.tensor([0, 5])
    with torch.no_grad():
        assert torch.equal(load_model(again)(x, t, y), model(x, t, y))
    implied = sum(
        layer.spec.nbytes(layer.out_features, layer.in_features, layer.bias is not None)
        for layer in quantized_layers(model).values()
    )
    rest = sum(
        v.nbytes for k, v in model.state_dict().items() if not any(k.startswith(n) for n in quantized_layers(model))
    )
    header = int.from_bytes(output.read_bytes()[:8], "little")
    assert output.stat().st_size == 8 + header + implied + rest


def test_the_same_command_writes_the_same_file(checkpoint: Path) -> None:
    one, two = (quantize(checkpoint, *QUICK, name=f"{n}.safetensors") for n in "ab")
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rank-ratio", "0.5", "--target-size", "0.4"], "--target-size excludes --rank-ratio"),
        (["--preset", "w4a8", "--group-size", "48"], "cannot be cut into groups of 48"),
        (["--skip", "*"], "no rule of the configuration selects"),
        (["--skip", "blocks.*", "--skip", "block.*"], "'block.*' matches no linear layer"),
        (["--output", "{folder}/q.bin"], "q.bin; choose a name that ends in .safetensors or .pt"),
        (["--output", "{folder}/folder.pt"], "folder.pt, which is a folder"),
        (["--output", "{folder}/tiny.safetensors"], "which is also the input"),
        (["--device", "meta"], "device 'meta' is not supported"),
    ],
)
def test_errors_are_one_line_and_leave_no_file(
    checkpoint: Path, flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint.parent / "folder.pt").mkdir()
    before = checkpoint.read_bytes()
    with pytest.raises(SystemExit) as stop:
        quantize(checkpoint, *(part.format(folder=checkpoint.parent) for part in flags))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert {path.name for path in checkpoint.parent.iterdir()} == {"tiny.safetensors", "folder.pt"}
    assert checkpoint.read_bytes() == before


def test_a_target_of_images_is_reached_by_the_file(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("svdit.cli.quantize_plan.STEPS", 4)
    output = quantize(checkpoint, "--target-psnr", "30", *FEW)
    plan = json.loads(output.with_suffix(".report.json").read_text())["settings"]["plan"]
    model = load_model(output)
    fidelity = Fidelity(load_model(checkpoint), calibration_sampling(model.config, 4), COMPARED)
    assert fidelity(accelerate(model)).pooled == plan["psnr"] == plan["tries"][0]["psnr"] >= 30
    assert f"PSNR {plan['psnr']:.1f} dB" in capsys.readouterr().err
    sized = quantize(checkpoint, "--preset", "auto", "--target-size", "0.3", *FEW, name="s.safetensors")
    plan = json.loads(sized.with_suffix(".report.json").read_text())["settings"]["plan"]
    assert sized.stat().st_size <= 300_000
    assert plan["psnr"] == max(each["psnr"] for each in plan["tries"])


def test_quantizing_a_quantized_file_is_an_error(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = quantize(checkpoint, "--rank-ratio", "0.5")
    with pytest.raises(SystemExit):
        quantize(output, "--rank-ratio", "0.5", name="twice.safetensors")
    assert "already quantized" in capsys.readouterr().err


def test_without_matplotlib_there_is_a_note_and_no_figures(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    output = checkpoint.with_name("q.safetensors")
    command("quantize", ["--ckpt", str(checkpoint), "--output", str(output), "--rank-ratio", "0.5"])
    assert "note: no figures: cannot import matplotlib" in capsys.readouterr().err
    assert json.loads(output.with_suffix(".report.json").read_text())["measured"]["sqnr"]
    assert not output.with_suffix(".report").exists()
