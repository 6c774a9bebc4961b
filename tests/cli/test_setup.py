"""The shared flags: what they mean together, and that asking for help is cheap."""

import argparse
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pixels import ROOT, saved

from svdit.checkpoints import hub
from svdit.cli import sample, sample_ddp, setup
from svdit.diffusion.samplers import SAMPLERS
from svdit.errors import UserError
from svdit.kernels import ops
from svdit.kernels.cpu import ffi
from svdit.model import autoencoder
from svdit.model.dit import DiT
from svdit.quant.config import QuantConfig, dit_config, recipe_for
from svdit.quant.quantize import quantize_
from svdit.runtime.dit import FastDiT
from svdit.sampling.dataset import LABEL_POLICIES

CPU = torch.device("cpu")


def arguments(*argv: str) -> argparse.Namespace:
    return sample.parser().parse_args(argv)


@pytest.mark.parametrize("command", ["sample", "sample_ddp"])
def test_help_needs_no_torch(command: str) -> None:
    code = (
        f"import sys; from svdit.cli import {command}; {command}.parser().format_help(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def choices(parser: argparse.ArgumentParser, flag: str) -> list[str]:
    return next(list(action.choices or []) for action in parser._actions if flag in action.option_strings)


def test_choices_are_what_the_library_knows() -> None:
    assert choices(sample_ddp.parser(), "--sampler") == list(SAMPLERS)
    assert choices(sample_ddp.parser(), "--label-policy") == list(LABEL_POLICIES)
    assert choices(sample_ddp.parser(), "--backend") == ["auto", *ops.BACKENDS]


@pytest.mark.parametrize("text", ["0", "-3", "many", "1.5"])
def test_a_count_is_a_whole_number_above_0(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        sample_ddp.parser().parse_args([f"--num-fid-samples={text}"])
    assert exit_.value.code == 2
    assert f"--num-fid-samples: {text} is not a whole number above 0" in capsys.readouterr().err


def test_a_seed_is_not_negative(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments("--seed=-1")
    assert "--seed: -1 is not a whole number from 0" in capsys.readouterr().err


def test_the_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    path = saved(tmp_path / "tiny.safetensors")
    loaded = setup.load_checkpoint(arguments("--ckpt", path), CPU)
    assert loaded.name == "tiny"
    assert setup.image_size(loaded.model) == 8
    agreed = arguments("--ckpt", path, "--image-size", "8", "--num-classes", "5")
    assert setup.load_checkpoint(agreed, CPU).model.config == loaded.model.config


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        (["--image-size", "256"], ["256", "8×8"]),
        (["--num-classes", "1000"], ["1000", "5"]),
        (["--model", "DiT-S/2"], ["DiT-S/2", "64"]),
        (["--model", "DiT-Z/2"], ["DiT-Z/2", "DiT-XL/2"]),
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_is_refused(tmp_path: Path, claim: list[str], said: list[str]) -> None:
    path = saved(tmp_path / "tiny.safetensors")
    with pytest.raises(UserError) as error:
        setup.load_checkpoint(arguments("--ckpt", path, *claim), CPU)
    assert all(part in str(error.value) for part in said)


def test_latents_are_eight_times_smaller(tmp_path: Path) -> None:
    path = saved(tmp_path / "tiny.safetensors", in_channels=4)
    loaded = setup.load_checkpoint(arguments("--ckpt", path, "--image-size", "64"), CPU)
    assert setup.image_size(loaded.model) == 64


def test_without_a_checkpoint_the_published_one_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def published_checkpoint(image_size: int) -> Path:
        asked.append(image_size)
        return tmp_path / "published.pt"

    monkeypatch.setattr(hub, "published_checkpoint", published_checkpoint)
    for argv in ([], ["--image-size", "512", "--model", "DiT-XL/2"]):
        assert setup.checkpoint_path(arguments(*argv)).name == "published.pt"
    assert asked == [256, 512]
    with pytest.raises(UserError, match="DiT-B/4 has none; give --ckpt"):
        setup.checkpoint_path(arguments("--model", "DiT-B/4"))


@pytest.mark.parametrize(
    ("channels", "name", "chosen"), [(1, "auto", "none"), (3, "none", "none"), (4, "auto", "mse"), (4, "ema", "ema")]
)
def test_the_autoencoder_follows_the_channels(
    channels: int, name: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoencoder, "load_autoencoder", lambda name, device: name)
    model = SimpleNamespace(config=SimpleNamespace(in_channels=channels))
    assert setup.load_vae(name, model, CPU, "mse") == chosen  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.parametrize(
    ("channels", "name", "said"),
    [(1, "ema", "--vae is ema, but the model has 1 channels"), (4, "none", "--vae is none"), (7, "auto", "7 channels")],
)
def test_an_autoencoder_that_does_not_fit_is_refused(channels: int, name: str, said: str) -> None:
    model = SimpleNamespace(config=SimpleNamespace(in_channels=channels))
    with pytest.raises(UserError, match=said):
        setup.load_vae(name, model, CPU, "mse")  # type: ignore[arg-type]


def test_devices() -> None:
    assert setup.device("cpu") == CPU
    assert setup.device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="no device 'abacus' here"):
        setup.device("abacus")
    with pytest.raises(UserError, match="no device 'cuda:99' here"):
        setup.device("cuda:99")


def test_cfg_channels() -> None:
    assert setup.sampling_config(arguments()).cfg_channels == 3
    assert setup.sampling_config(arguments("--cfg-channels", "all")).cfg_channels is None


def test_cfg_interval() -> None:
    assert setup.sampling_config(arguments()).cfg_interval is None
    assert setup.sampling_config(arguments("--cfg-interval", "100", "700")).cfg_interval == (100, 700)


def test_progress_is_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with setup.progress("sampling") as tick:
        tick(1, 2)
    assert capsys.readouterr() == ("", "")


def test_quantized_models_are_accelerated_and_it_is_told_why_not(
    tiny: DiT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup.accelerated(tiny, arguments()) is tiny
    config = dit_config(recipe_for("rtn"))
    fast = setup.accelerated(quantized(deepcopy(tiny), config), arguments("--backend=dequant"))
    assert isinstance(fast, FastDiT) and fast.backend == "dequant"
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(ffi, "why_not", lambda: "there is no C compiler")
    fast = setup.accelerated(quantized(deepcopy(tiny), config), arguments())
    assert isinstance(fast, FastDiT) and fast.backend != "cpu"
    assert "slower than it could be: there is no C compiler" in capsys.readouterr().err


def quantized(model: DiT, config: QuantConfig) -> DiT:
    quantize_(model, config)
    return model
