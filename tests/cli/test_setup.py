"""The shared options: what they mean together."""

import argparse
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pixels import saved

from svdit.checkpoints import hub
from svdit.cli import sample, setup
from svdit.errors import UserError
from svdit.kernels import ops
from svdit.model import autoencoder
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


def test_latents_are_eight_times_smaller_than_images(tmp_path: Path) -> None:
    path = saved(tmp_path / "tiny.safetensors", in_channels=4)
    loaded = setup.load_checkpoint(arguments("--ckpt", path, "--image-size", "64"), CPU)
    assert setup.image_size(loaded.model) == 64


def test_without_a_checkpoint_the_published_one_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def published_checkpoint(image_size: int) -> Path:
        asked.append(image_size)
        return tmp_path / "published.pt"

    monkeypatch.setattr(hub, "published_checkpoint", published_checkpoint)
    for argv in ([], ["--image-size", "512", "--model", "DiT-XL/2"]):
        assert setup.checkpoint_path(arguments(*argv)).name == "published.pt"
    assert asked == [256, 512]
    with pytest.raises(UserError, match="DiT-B/4 has no published weights, only DiT-XL/2 has; pass --ckpt"):
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
    ("channels", "name", "message"),
    [(1, "ema", "--vae is ema, but the model has 1 channels"), (4, "none", "--vae is none"), (7, "auto", "7 channels")],
)
def test_an_autoencoder_that_does_not_match_is_an_error(channels: int, name: str, message: str) -> None:
    model = SimpleNamespace(config=SimpleNamespace(in_channels=channels))
    with pytest.raises(UserError, match=message):
        setup.load_vae(name, model, CPU, "mse")  # type: ignore[arg-type]


def test_devices() -> None:
    assert setup.device("cpu") == CPU
    assert setup.device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="device 'cuda:99' is unavailable"):
        setup.device("cuda:99")


@pytest.mark.parametrize("name", ["abacus", "meta", "privateuseone", "hpu", "mkldnn", "", "cpu:-1", "CPU"])
def test_other_devices_are_not_supported(name: str) -> None:
    with pytest.raises(UserError, match=f"device {name!r} is not supported"):
        setup.device(name)


def test_cfg_channels() -> None:
    assert setup.sampling_config(arguments()).cfg_channels == 3
    assert setup.sampling_config(arguments("--cfg-channels", "all")).cfg_channels is None


def test_cfg_interval() -> None:
    assert setup.sampling_config(arguments()).cfg_interval is None
    assert setup.sampling_config(arguments("--cfg-interval", "100", "700")).cfg_interval == (100, 700)


def test_quantized_models_are_accelerated_or_a_note_says_why_not(
    tiny: DiT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup.accelerated(tiny, arguments()) is tiny
    assert capsys.readouterr().err == ""
    assert setup.accelerated(tiny, arguments("--backend=dequant", "--debug")) is tiny
    assert "--backend and --debug have no effect: the checkpoint is not quantized" in capsys.readouterr().err
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
