"""`svdit quantize`: flags to recipes, files that weigh what they say, reports, sentences."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svdit.checkpoints.store import load_model, read_header, save_model
from svdit.cli import command
from svdit.cli.quantize import PRESETS, parser, recipe_of
from svdit.model.dit import DiT
from svdit.quant.config import RECIPES
from svdit.quant.linear import quantized_layers

QUICK = ["--calib-images", "4", "--calib-steps", "3", "--rank", "4"]


@pytest.fixture
def checkpoint(tiny: DiT, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
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
    printed = capsys.readouterr().out
    assert "more numbers than the weight" in " ".join(printed.split())
    assert "MB before" in printed
    report = json.loads(output.with_suffix(".report.json").read_text())
    assert len(report["layers"]) == 14
    assert not list(checkpoint.parent.glob("*.partial"))


@pytest.mark.parametrize("preset", ["w8a8", "w4a4", "svdquant"])
def test_a_preset_reloads_bit_exactly_and_weighs_what_its_formats_imply(checkpoint: Path, preset: str) -> None:
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


def test_the_same_command_gives_the_same_file(checkpoint: Path) -> None:
    one, two = (quantize(checkpoint, *QUICK, name=f"{n}.safetensors") for n in "ab")
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], RECIPES["w8a8"]),
        (
            ["--preset", "w4a8", "--num-bits", "8", "--group-size", "0"],
            replace(RECIPES["w4a8"], weight=RECIPES["w8a8"].weight),
        ),
        (["--num-bits", "4"], RECIPES["w4a8"]),
        (["--num-bits", "4", "--group-size", "0"], RECIPES["w4a8-channel"]),
        (["--num-bits", "4", "--act-bits", "4"], RECIPES["w4a4"]),
        (["--preset", "w4a8", "--act-bits", "16"], RECIPES["w4a16"]),
    ],
)
def test_flags_and_presets_meet(flags: list[str], expected: object) -> None:
    assert recipe_of(parser().parse_args(flags)) == expected


def test_the_parsers_presets_are_the_recipes() -> None:
    assert set(PRESETS) == set(RECIPES)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rank-ratio", "1.5"], "rank ratio of 1.5 is impossible"),
        (["--rank-ratio", "0.5", "--num-bits", "9"], "9 bits cannot be stored"),
        (["--whiten"], "--whiten belongs to --rank-ratio"),
        (["--preset", "w4a8", "--group-size", "48"], "cannot be cut into groups of 48"),
        (["--rank", "-1"], "rank -1"),
        (["--skip", "*"], "no rule of the configuration matches"),
    ],
)
def test_mistakes_are_sentences_and_leave_nothing(
    checkpoint: Path, flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        quantize(checkpoint, "--calib-images", "2", "--calib-steps", "2", *flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert not list(checkpoint.parent.glob("q.*"))


def test_other_endings_are_refused_before_the_work(checkpoint: Path) -> None:
    with pytest.raises(SystemExit):
        quantize(checkpoint, name="q.bin")


def test_quantizing_a_quantized_file_is_a_sentence(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = quantize(checkpoint, "--rank-ratio", "0.5")
    with pytest.raises(SystemExit):
        quantize(output, "--rank-ratio", "0.5", name="twice.safetensors")
    assert "quantized already" in capsys.readouterr().err
