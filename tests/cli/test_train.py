"""`svdit train` from its flags to a model that loads; one process or two."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative
from PIL import Image

from svdit.checkpoints.store import load_model, read_header
from svdit.cli import command
from svdit.model.zoo import config_for
from svdit.shims import allow_cpu_torchvision
from svdit.training.monitor import read_curve

DOOR = Path(__file__).parents[2] / "train.py"
DIGITS = ["--data", "digits", "--model", "DiT-digits", "--augment", "none", "--num-workers", "0", "--device", "cpu"]
SHORT = [*DIGITS, "--global-batch-size", "4", "--steps", "3", "--log-every", "1", "--lr", "1e-3"]


def run(*command: str) -> None:
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert not done.returncode, done.stderr


@pytest.fixture
def no_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling takes longer than these few steps."""
    monkeypatch.setattr("svdit.training.loop.sample_grid", lambda *arguments: None)


@pytest.mark.usefixtures("no_grids")
def test_trains_on_digits_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("train", [*SHORT, "--results-dir", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "ema.safetensors")
    model, header = (
        load_model(tmp_path / "ema.safetensors", name="DiT-digits"),
        read_header(tmp_path / "ema.safetensors"),
    )
    assert header is not None
    assert header["provenance"]["step"] == 3
    assert header["provenance"]["data"] == "digits"
    assert header["provenance"]["training"]["lr"] == 1e-3
    command("train", [*SHORT, "--results-dir", str(tmp_path), "--steps", "5"])
    rows = read_curve(tmp_path / "loss.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert rows[-1]["held_out_mse"]
    later = load_model(tmp_path / "ema.safetensors")
    assert relative(later.final_layer.linear.weight, model.final_layer.linear.weight) > 0


@pytest.mark.usefixtures("no_grids")
@pytest.mark.parametrize("name", ["SiT-digits", "JiT-digits"])
def test_flow_models_train_on_digits(tmp_path: Path, name: str) -> None:
    command("train", [*SHORT, "--results-dir", str(tmp_path), "--model", name])
    model, header = load_model(tmp_path / "ema.safetensors"), read_header(tmp_path / "ema.safetensors")
    assert model.config == config_for(name)
    assert (header or {})["name"] == name
    rows = read_curve(tmp_path / "loss.csv", model.config.family)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert list(rows[0]) == ["step", "loss", "mse", "held_out_mse", "seconds"]
    assert rows[-1]["held_out_mse"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_grids")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(*torchrun, str(DOOR), *SHORT, "--results-dir", str(tmp_path / "two"))
    command("train", [*SHORT, "--results-dir", str(tmp_path / "one")])
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("one", "two")]
    errors = [relative(states[1][key], weight) for key, weight in states[0].items() if weight.norm() > 0]
    assert 0 < max(errors) < 1e-4
    curves = [[float(row["loss"]) for row in read_curve(tmp_path / name / "loss.csv")] for name in ("one", "two")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)  # as equal as the weights


def class_folders(folder: Path) -> Path:
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            pixels = random.integers(256, size=(12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.jpg")
    return folder


def tiny_vae(folder: Path) -> str:
    allow_cpu_torchvision()
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, **blocks).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("latent", "size", "expected"), [(False, 8, (3, 8, 2)), (True, 64, (4, 8, 2))])
def test_a_folder_of_pictures(tmp_path: Path, latent: bool, size: int, expected: tuple[int, int, int]) -> None:
    vae = tiny_vae(tmp_path / "vae") if latent else "none"
    flags = ["--data", str(class_folders(tmp_path / "data")), "--model", "DiT-digits", "--vae", vae, "--device", "cpu"]
    flags += ["--image-size", str(size), "--global-batch-size", "2", "--epochs", "1", "--num-workers", "0"]
    command("train", [*flags, "--results-dir", str(tmp_path / "out")])
    config = load_model(tmp_path / "out" / "ema.safetensors").config
    assert (config.in_channels, config.input_size, config.num_classes) == expected
    assert (read_header(tmp_path / "out" / "ema.safetensors") or {})["name"] == ""  # no longer the digits' shape
    assert read_curve(tmp_path / "out" / "loss.csv")[-1]["step"] == "2"
    assert Image.open(tmp_path / "out" / "samples" / "0000002.png").size == (2 * 66 + 2, 4 * 66 + 2)


@pytest.mark.usefixtures("no_grids")
def test_normalized_latents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statistics = {"mean": torch.full((1, 4, 1, 1), 0.5), "std": torch.full((1, 4, 1, 1), 2.0)}
    torch.save(statistics, tmp_path / "latents_stats.pt")
    torch.save({key: value[:, :3] for key, value in statistics.items()}, tmp_path / "three.pt")
    flags = ["--data", str(class_folders(tmp_path / "data")), "--model", "DiT-digits", "--image-size", "64"]
    flags += ["--vae", tiny_vae(tmp_path / "vae"), "--device", "cpu", "--global-batch-size", "4", "--steps", "1"]
    flags += ["--num-workers", "0", "--results-dir", str(tmp_path / "out"), "--latent-stats"]
    with pytest.raises(SystemExit, match="2"):
        command("train", [*flags, str(tmp_path / "three.pt")])
    assert "latent_std 3; pass one for each of the 4 channels" in capsys.readouterr().err
    command("train", [*flags, str(tmp_path / "latents_stats.pt")])
    config = load_model(tmp_path / "out" / "ema.safetensors").config
    assert (config.latent_mean, config.latent_std) == ((0.5,) * 4, (2.0,) * 4)


PIXELS = ["--model", "DiT-digits", "--vae", "none", "--image-size", "8", "--device", "cpu", "--global-batch-size", "4"]


@pytest.mark.usefixtures("no_grids")
def test_the_data_is_described_and_a_run_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = class_folders(tmp_path / "data")
    (data / "empty").mkdir()
    flags = [*PIXELS, "--data", str(data), "--num-workers", "0", "--results-dir", str(tmp_path / "out")]
    command("train", [*flags, "--steps", "1"])
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == "4 images in 2 classes: cat … dog"
    assert shown.err == "note: folders without images are no classes: empty\n"
    assert load_model(tmp_path / "out" / "ema.safetensors").class_names == ("cat", "dog")
    command("inspect", [str(tmp_path / "out" / "ema.safetensors")])
    assert "class names: cat, dog\n" in capsys.readouterr().out
    (data / "dog").rename(data / "wolf")
    with pytest.raises(SystemExit):
        command("train", [*flags, "--steps", "2"])
    assert "trained with data 4 images in 2 classes: cat … dog (" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command("train", [*flags, "--num-classes", "1000"])
    assert "--num-classes is 1000, but" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_image_that_a_worker_cannot_read_is_named_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    data = class_folders(tmp_path / "data")
    for file in data.rglob("*.jpg"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    flags = [*PIXELS, "--data", str(data), "--num-workers", workers, "--results-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        command("train", flags)
    message = capsys.readouterr().err
    assert re.fullmatch(r"svdit train: .*\.jpg cannot be read as an image \(.*\); remove or replace it\n", message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere"], "there is no nowhere"),
        (["--image-size", "16"], "digits have 8×8 pixels"),
        (["--vae", "ema"], "--vae is ema, but the digits are learned in pixel space"),
        (["--num-classes", "9"], "--num-classes is 9, but digits has 10"),
        (["--model", "DiT-M/2"], "there is no model 'DiT-M/2'"),
        (["--data", "x", "--model", "LightningDiT-B/1"], "LightningDiT-B/1 learns latents of 32 channels; pass --vae"),
        (["--model", "JiT-B/16"], "cannot divide input_size 8 by patch_size 16"),
        (["--device", "tpu"], "device 'tpu' is not supported"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        command("train", [*SHORT, "--results-dir", str(tmp_path / "out"), *flags])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))
