"""The shared options: what they mean together."""

import argparse
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pixels import pixel_model, saved

from svdit.checkpoints import hub
from svdit.cli import command, sample, setup
from svdit.errors import UserError
from svdit.kernels import ops
from svdit.model.dit import DiT
from svdit.quant.config import QuantConfig, dit_config, recipe_for
from svdit.quant.quantize import quantize_
from svdit.runtime.dit import FastDiT

CPU = torch.device("cpu")


def arguments(*argv: str) -> argparse.Namespace:
    return sample.parser().parse_args(argv)


def test_checkpoint_describes_itself(tmp_path: Path) -> None:
    path = saved(tmp_path / "tiny.safetensors")
    loaded = setup.load_checkpoint(arguments("--ckpt", path), CPU)
    assert loaded.name == "tiny"
    assert setup.image_size(loaded.model) == 8
    agreed = arguments("--ckpt", path, "--image-size", "8", "--num-classes", "5")
    assert setup.load_checkpoint(agreed, CPU).model.config == loaded.model.config


@pytest.mark.parametrize(
    ("claim", "parts"),
    [
        (["--image-size", "256"], ["256", "8×8"]),
        (["--num-classes", "1000"], ["1000", "5"]),
        (["--model", "DiT-S/2"], ["DiT-S/2", "64"]),
        (["--model", "DiT-Z/2"], ["DiT-Z/2", "DiT-XL/2"]),
    ],
)
def test_an_option_that_contradicts_the_checkpoint_is_an_error(
    tmp_path: Path, claim: list[str], parts: list[str]
) -> None:
    path = saved(tmp_path / "tiny.safetensors")
    with pytest.raises(UserError) as error:
        setup.load_checkpoint(arguments("--ckpt", path, *claim), CPU)
    assert all(part in str(error.value) for part in parts)


def test_latents_are_smaller_than_images(tmp_path: Path) -> None:
    path = saved(tmp_path / "tiny.safetensors", in_channels=4)
    loaded = setup.load_checkpoint(arguments("--ckpt", path, "--image-size", "64"), CPU)
    assert setup.image_size(loaded.model) == 64
    path = saved(tmp_path / "tiny.safetensors", in_channels=32)
    assert setup.image_size(setup.load_checkpoint(arguments("--ckpt", path), CPU).model) == 128
    path = saved(tmp_path / "tiny.safetensors", in_channels=7)
    loaded = setup.load_checkpoint(arguments("--ckpt", path, "--image-size", "5"), CPU)  # the autoencoder decides
    assert setup.image_size(loaded.model) is None


def test_without_a_checkpoint_the_published_one_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def published_checkpoint(image_size: int) -> Path:
        asked.append(image_size)
        return tmp_path / "published.pt"

    monkeypatch.setattr(hub, "published_checkpoint", published_checkpoint)
    for argv in ([], ["--image-size", "512", "--model", "DiT-XL/2"]):
        assert setup.checkpoint_path(arguments(*argv)).name == "published.pt"
    assert asked == [256, 512]
    with pytest.raises(UserError, match="only the published DiT-XL/2 is downloaded, not DiT-B/4; pass --ckpt"):
        setup.checkpoint_path(arguments("--model", "DiT-B/4"))
    with pytest.raises(UserError, match="is downloaded, not sit; pass --ckpt"):
        setup.checkpoint_path(arguments("--family", "sit"))
    with pytest.raises(UserError, match="is downloaded, not repa-sde-250; pass --ckpt"):
        setup.checkpoint_path(sample.parser().parse_args(["--protocol", "repa-sde-250"]))
    assert asked == [256, 512]


def test_devices() -> None:
    assert setup.device("cpu") == CPU
    assert setup.device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="device 'cuda:99' is unavailable"):
        setup.device("cuda:99")


@pytest.mark.parametrize("name", ["abacus", "meta", "privateuseone", "hpu", "mkldnn", "", "cpu:-1", "CPU"])
def test_other_devices_are_not_supported(name: str) -> None:
    with pytest.raises(UserError, match=f"device {name!r} is not supported"):
        setup.device(name)


def test_quantized_models_are_accelerated_or_a_note_says_why_not(
    tiny: DiT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup.accelerated(tiny, arguments()) is tiny
    assert capsys.readouterr().err == ""
    assert setup.accelerated(tiny, arguments("--backend=dequant", "--debug")) is tiny
    assert "--backend and --debug without effect: the checkpoint is not quantized" in capsys.readouterr().err
    config = dit_config(recipe_for("rtn"))
    fast = setup.accelerated(quantized(deepcopy(tiny), config), arguments("--backend=dequant"))
    assert isinstance(fast, FastDiT) and fast.backend == "dequant"
    assert capsys.readouterr().err == ""
    missing = replace(ops.BACKENDS["cpu"], missing=lambda device: "there is no C compiler")
    monkeypatch.setitem(ops.BACKENDS, "cpu", missing)
    fast = setup.accelerated(quantized(deepcopy(tiny), config), arguments())
    assert isinstance(fast, FastDiT) and fast.backend != "cpu"
    assert "note: the fastest backend is unavailable: there is no C compiler" in capsys.readouterr().err


def quantized(model: DiT, config: QuantConfig) -> DiT:
    quantize_(model, config)
    return model


@pytest.fixture
def no_null_class(tmp_path: Path) -> str:
    """A state dict of 5 classes, trained without label dropout, of a width that no named model has."""
    torch.save(pixel_model(has_null_class=False).state_dict(), tmp_path / "bare.pt")
    return str(tmp_path / "bare.pt")


SHAPE = ["--family", "dit", "--num-classes", "5", "--num-heads", "2"]
FAST = ["--num-sampling-steps", "2", "--device", "cpu"]


def test_every_row_of_the_label_table_can_be_a_class(no_null_class: str, tmp_path: Path) -> None:
    output, quantized = str(tmp_path / "a.png"), str(tmp_path / "q.safetensors")
    sampling = [*FAST, "--cfg-scale", "1", "--classes", "4", "--output", output]
    command("sample", ["--ckpt", no_null_class, *SHAPE, *sampling])
    first = Path(output).read_bytes()
    method = "--cfg-scale 1 --calib-images 1 --calib-steps 1 --rank 4 --no-figures --device cpu --output"
    command("quantize", ["--ckpt", no_null_class, *SHAPE, *method.split(), quantized])
    command("sample", ["--ckpt", quantized, *sampling])
    assert Path(output).read_bytes() != first  # quantized, and self-describing
    command("verify", [quantized, "--against", no_null_class])


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("sample", [*FAST]),
        ("generate", [*FAST, "--num-fid-samples", "2", "--sample-dir", "out"]),
        ("quantize", ["--rank-ratio", "0.5", "--output", "out.pt"]),
    ],
)
def test_without_a_null_class_there_is_no_guidance(
    name: str, argv: list[str], no_null_class: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        command(name, ["--ckpt", no_null_class, *SHAPE, *argv])
    assert "the model has no null class, so it cannot be guided" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} <= {"bare.pt"}


def test_inspect_shows_what_it_assumes_of_the_last_row(no_null_class: str, capsys: pytest.CaptureFixture[str]) -> None:
    command("inspect", [no_null_class, "--family", "dit", "--num-heads", "2"])
    out = " ".join(capsys.readouterr().out.split())
    assert "classes: 4 and the null class of guidance; if all 5 rows of the label table are classes, pass --num" in out
    command("inspect", [no_null_class, *SHAPE])
    assert "classes: 5, no null class, so no guidance" in " ".join(capsys.readouterr().out.split())


def test_the_number_of_heads_can_be_passed(
    no_null_class: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command("sample", ["--ckpt", no_null_class, "--family", "dit", *FAST, "--output", str(tmp_path / "a.png")])
    assert "pass num_heads in Python, or --num-heads" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sample", "generate", "quantize", "inspect"])
def test_every_command_refuses_weights_that_are_not_finite(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = pixel_model()
    model.blocks[0].mlp.fc1.weight.data[3, 1] = float("nan")
    torch.save(model.state_dict(), "nan.pt")
    with pytest.raises(SystemExit, match="2"):
        command(
            name, [*(["nan.pt"] if name == "inspect" else ["--ckpt", "nan.pt"]), "--family", "dit", "--num-heads", "2"]
        )
    assert "has 1 NaN or Inf among the 16384 values of blocks.0.mlp.fc1.weight" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["nan.pt"]
