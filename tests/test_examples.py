"""Every example runs as a user would run it, with fewer images, and what it quantizes stays close to full precision."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pixels import ROOT, randomize

from svdit.checkpoints.hub import BASE_URL, PUBLISHED
from svdit.checkpoints.store import save_model
from svdit.evaluation import weights
from svdit.evaluation.inception import random_extractor
from svdit.images import list_images, read_image
from svdit.model.autoencoder import REPOSITORIES
from svdit.model.dit import DiT, DiTConfig
from svdit.sampling.protocols import ADM
from svdit.shims import allow_cpu_torchvision

FOLDER = ROOT / "examples"
NOT_HERE = {"demo.py"}  # `make demo`
CLOSE: dict[str, Callable[[dict[str, Any], Path], bool]] = {  # what must hold of each one's variables and folder
    "quantize_my_dit.py": lambda names, out: (
        40 < names["psnr"] < 100 and read_image(out / "before_and_after.png").shape == (262, 522, 3)
    ),
    "my_module.py": lambda names, out: 0 < names["error"] < 0.05 and (out / "quantized.safetensors").is_file(),
    "only_the_mlps.py": lambda names, out: (
        40 < names["psnr"] < 100 and {line.name.split(".")[2] for line in names["report"].layers} == {"mlp"}
    ),
    "budget.py": lambda names, out: 1.4e6 < names["report"].bytes_after <= 1.5e6 and len(names["formats"]) > 1,
    "number_format.py": lambda names, out: 30 < names["psnr"]["W4A8"] < names["psnr"]["W5A8"] < names["psnr"]["W8A8"],
    "sampler.py": lambda names, out: 30 < names["psnr"]["euler"] < names["psnr"]["ab2"] < 100,
    "reproduce_table.py": lambda names, out: (
        30 < names["psnr"]["svdquant-w4a4"] < names["psnr"]["w4a4"] < names["psnr"]["w4a8"] < names["psnr"]["w8a8"]
    ),
    "pipeline.py": lambda names, out: 0 < names["error"] < 0.05 and (out / "dit-w8a8" / "model_index.json").is_file(),
    "copies_and_precision.py": lambda names, out: 0 < names["error"] < 0.05,
    "special_layers.py": lambda names, out: 0 < names["error"] < 0.05,
}
ARGUMENTS = {"reproduce_table.py": ["16"]}
SLOW = {"budget.py", "number_format.py", "reproduce_table.py"}  # several quantizations, or many


def marked(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name


def test_every_example_is_run() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == set(CLOSE) | NOT_HERE
    assert {path.name for path in FOLDER.glob("*.sh")} == {"fid50k.sh", "offline_cluster.sh"}


@pytest.mark.parametrize("name", [marked(name) for name in CLOSE])
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("svdit.api.calibration_size", lambda model: (6, 6))
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS.get(name, [])])
    names = runpy.run_path(str(FOLDER / name))
    assert CLOSE[name](names, tmp_path)
    assert capsys.readouterr().out


def run(name: str, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script of the examples in `folder`, with this Python and one thread a process."""
    tools = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": tools, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    command = ["sh", str(FOLDER / name), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_fid_on_several_processes(tmp_path: Path) -> None:
    np.savez(tmp_path / "real.npz", arr_0=np.random.RandomState(0).randint(0, 256, (12, 8, 8, 3)).astype(np.uint8))
    small = {"CHECKPOINT": "digits", "REAL": "real.npz", "COUNT": "12", "PROCESSES": "2", "FOLDER": "out"}
    more = "--vae none --num-sampling-steps 4 --feature-extractor random --metrics fid --cache-dir cache --device cpu"
    done = run("fid50k.sh", tmp_path, **small, MORE=more)
    assert done.returncode == 0, done.stderr
    assert "random_fid" in done.stdout
    values = [json.loads((tmp_path / "out" / name / "metrics.json").read_text()) for name in ("full", "w8a8")]
    assert [content["protocol"]["n_fake"] for content in values] == [12, 12]
    again = run("fid50k.sh", tmp_path, **small, MORE=more)  # resumes: samples nothing
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-3:] == done.stdout.splitlines()[-3:]


def stub(folder: Path, *names: str) -> None:
    """Commands that write down how they were called."""
    (folder / "bin").mkdir()
    for name in names:
        (folder / "bin" / name).write_text(f'#!/bin/sh\necho {name} "$@" >> "{folder}/calls"\nmkdir -p offline\n')
        (folder / "bin" / name).chmod(0o755)


def test_the_offline_cluster_gets_the_published_files(tmp_path: Path) -> None:
    stub(tmp_path, "pip", "hf", "curl")
    done = run("offline_cluster.sh", tmp_path, "fetch")
    assert done.returncode == 0, done.stderr
    packages, vae, *files = (tmp_path / "calls").read_text().splitlines()
    assert "--constraint constraints.txt" in packages
    assert vae.split()[2] == REPOSITORIES["ema"]
    dit, network, reference = [line.split()[-1] for line in files]
    assert (dit, network) == (f"{BASE_URL}{PUBLISHED[256]}", weights.URL)
    assert reference.rsplit("/", 1)[1] == ADM[256]
    assert run("offline_cluster.sh", tmp_path).returncode == 2


@pytest.mark.slow
def test_the_offline_cluster_needs_no_network(tmp_path: Path) -> None:
    allow_cpu_torchvision()
    from diffusers import AutoencoderKL

    stub(tmp_path, "pip")
    folder = tmp_path / "offline"
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, **blocks)
    vae.save_pretrained(folder / "vae")
    model = randomize(DiT(DiTConfig(4, 2, 4, hidden_size=64, depth=1, num_heads=2, num_classes=5)))
    assert isinstance(model, DiT)
    save_model(model, folder / "model.pt")
    (folder / "model.pt").rename(folder / PUBLISHED[256])
    np.savez(folder / ADM[256], arr_0=np.random.RandomState(0).randint(0, 256, (12, 32, 32, 3)).astype(np.uint8))
    torch.save(unfolded(), folder / weights.NAMES[0])
    small = {"COUNT": "12", "PROCESSES": "2", "MORE": "--num-sampling-steps 2 --device cpu"}
    dead = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = run("offline_cluster.sh", tmp_path, "run", **small, **dead, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert len(list_images(tmp_path / "samples")) == 12
    assert json.loads((tmp_path / "results" / "metrics.json").read_text())["metrics"]["fid"]["value"] > 0


def unfolded() -> dict[str, torch.Tensor]:
    """Random weights of the Inception network, as a file has them."""
    return dict(random_extractor(fast=False).network.state_dict())
