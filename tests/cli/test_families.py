"""A checkpoint of each family's own training script through every command, in this process and as a user would.

Latents are decoded by a tiny VAE with random weights; JiT generates pixels.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import randomize
from PIL import Image
from scripts import run_script
from training_files import OPTIONS, WRITERS, write

from svdit.checkpoints.store import load_model
from svdit.cli import command
from svdit.quant.linear import quantized_layers
from svdit.shims import allow_cpu_torchvision

FAST = "--num-sampling-steps 3 --device cpu"
QUICK = "--preset w4a8 --rank 4 --calib-images 2 --calib-steps 3 --no-figures --device cpu"


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with an autoencoder of 4 channels, 8 times smaller than its images."""
    allow_cpu_torchvision()
    from diffusers import AutoencoderKL

    levels = {"block_out_channels": (8,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4}
    network = AutoencoderKL(**levels, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, layers_per_block=1)
    folder = tmp_path_factory.mktemp("vae")
    randomize(network)
    network.save_pretrained(folder)
    return str(folder)


def steps(family: str, folder: Path, vae: str) -> dict[str, list[str]]:
    """The commands, in order, with the arguments of each."""
    checkpoint, quantized = str(write(family, folder / "results")[0]), str(folder / "q.safetensors")
    decoding = ["--vae", "none" if family == "jit" else vae, *FAST.split()]
    images = ["--num-fid-samples", "4", "--per-proc-batch-size", "2", *decoding]
    full, fake, results = (str(folder / name) for name in ("full", "fake", "metrics"))
    evaluation = ["--fake_dir", fake, "--paired_dir", full, "--metrics", "paired", "--device", "cpu"]
    return {
        "inspect": [checkpoint, *OPTIONS[family]],
        "sample": ["--ckpt", checkpoint, *OPTIONS[family], "--output", str(folder / "grid.png"), *decoding],
        "quantize": ["--ckpt", checkpoint, *OPTIONS[family], "--output", quantized, *QUICK.split()],
        "verify": [quantized, "--against", checkpoint],
        "generate full": ["--ckpt", checkpoint, *OPTIONS[family], "--sample-dir", full, *images],
        "generate": ["--ckpt", quantized, "--sample-dir", fake, *images],
        "evaluate": [*evaluation, "--output", results],
    }


def check(family: str, folder: Path) -> None:
    """What the commands wrote."""
    name = {"repae": "repa"}.get(family, family)
    model = load_model(folder / "q.safetensors")
    assert model.config.family == name
    assert (len(model.config.latent_std) == 4) == (family in ("repae", "lightningdit"))
    assert quantized_layers(model)
    assert json.loads((folder / "fake" / "manifest.json").read_text())["family"] == name
    full, fake = (
        np.stack([np.asarray(Image.open(folder / kind / f"{i:06}.png")) for i in range(4)]) for kind in ("full", "fake")
    )
    assert np.asarray(Image.open(folder / "grid.png")).std() > 5
    assert fake.std() > 5 and not np.array_equal(full, fake)
    psnr = json.loads((folder / "metrics" / "metrics.json").read_text())["metrics"]["psnr"]["value"]
    assert 15 < psnr < 100


def some(*names: str) -> list[Any]:
    """All families; only those named are not slow."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in WRITERS]


@pytest.mark.parametrize("family", some("sit", "repae", "lightningdit"))
def test_every_command_on_a_checkpoint_of_the_training_script(
    family: str, tmp_path: Path, vae: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, arguments in steps(family, tmp_path, vae).items():
        command(name.split()[0], arguments)
        if name == "inspect":
            assert f"family: {family.removesuffix('e')}" in capsys.readouterr().out
    check(family, tmp_path)


SCRIPTS = {
    "sample": "sample.py",
    "quantize": "quantize_ptq.py",
    "generate": "sample_ddp.py",
    "evaluate": "evaluate_metrics.py",
}


@pytest.mark.parametrize("family", some("jit"))
def test_every_script_on_a_checkpoint_of_the_training_script(family: str, tmp_path: Path, vae: str) -> None:
    """Under torchrun: `test_sample_ddp.py`, `test_commands.py`."""
    arguments = steps(family, tmp_path, vae)
    command("generate", arguments["generate full"])
    for name, script in SCRIPTS.items():
        done = run_script(script, *arguments[name])
        assert done.returncode == 0, done.stderr
    check(family, tmp_path)


def test_without_a_family_every_command_refuses_a_file_that_may_be_a_dit_or_a_sit(
    tmp_path: Path, vae: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, arguments in steps("sit", tmp_path, vae).items():
        if "--family" in arguments:
            at = arguments.index("--family")
            with pytest.raises(SystemExit, match="2"):
                command(name.split()[0], arguments[:at] + arguments[at + 2 :])
            error = capsys.readouterr().err
            assert "may be a DiT or a SiT" in error and "pass --family dit or --family sit" in error
            assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"results"}
