"""Every command with `--device cuda`, from its arguments to its files: the files of `--device cpu`."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize
from devices.fake_cuda import FakeCuda
from devices.test_evaluation import Network

from svdit.checkpoints.store import load_model, save_model
from svdit.cli import command, quantize_plan
from svdit.model.dit import DiT, DiTConfig
from svdit.model.zoo import CONFIGS
from svdit.recovery import loop, states
from svdit.sampling import calibration

FAST = "--calib-images 2 --calib-steps 2"
STEPS = "--num-sampling-steps 3"
QUANTIZE = {
    "a preset": f"--preset w8a8 --no-figures {FAST} --skip *.attn.*",
    "a size": f"--preset w8a16 --target-size 0.3 --no-figures {FAST} --skip *.attn.* --skip *.fc1",
    "a rank ratio": "--rank-ratio 0.5 --num-bits 8 --no-figures --skip *.attn.* --skip t_embedder*",
}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of 8 × 8 pixels, 64 wide, one block."""
    monkeypatch.setattr(calibration, "CONDITIONS", 64)
    monkeypatch.setattr(quantize_plan, "STEPS", 2)
    model = randomize(DiT(DiTConfig(8, 4, 3, hidden_size=64, depth=1, num_heads=2, mlp_ratio=1, num_classes=5)))
    assert isinstance(model, DiT)
    save_model(model, tmp_path / "tiny.safetensors", name="tiny")
    return tmp_path / "tiny.safetensors"


def on_both(name: str, flags: str, output: str, folder: Path, grad: bool = False) -> tuple[Path, Path]:
    """Run a command on the CPU and on the fake GPU, with `output` naming its flag for results; the two results."""
    option, suffix = output.split()
    results = []
    for device in ("cpu", "cuda"):
        results.append(folder / f"{device}{suffix}")
        argv = [*flags.split(), "--device", device, option, str(results[-1])]
        if device == "cuda":
            with FakeCuda(grad):
                command(name, argv)
        else:
            command(name, argv)
    return results[0], results[1]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # safetensors looks for shared memory
@pytest.mark.parametrize("kind", QUANTIZE)
def test_quantize_and_verify(kind: str, source: Path, tmp_path: Path) -> None:
    cpu, cuda = on_both("quantize", f"--ckpt {source} {QUANTIZE[kind]}", "--output .safetensors", tmp_path, grad=True)
    assert cuda.read_bytes() == cpu.read_bytes()
    command("verify", [str(cuda), "--against", str(source)])


def test_recover(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for constant, value in {"IMAGES": 2, "WALKS": 2, "STEPS": (3,), "ROWS": 8, "EVERY": 1}.items():
        monkeypatch.setattr(loop, constant, value)
    monkeypatch.setattr(states, "Walk", partial(states.Walk, steps=10))
    file, output = tmp_path / "q.safetensors", tmp_path / "r.safetensors"
    preset = f"--preset svdquant --rank 2 --no-figures {FAST} --skip *.attn.*"
    command("quantize", ["--ckpt", str(source), *preset.split(), "--device", "cpu", "--output", str(file)])
    argv = [str(file), "--against", str(source), "--steps", "2", "--device", "cuda", "--output", str(output)]
    with FakeCuda(grad=True):
        command("recover", argv)
    command("verify", [str(output), "--against", str(source)])


def test_images_decide_on_a_gpu(source: Path, tmp_path: Path) -> None:
    output, flags = tmp_path / "q.safetensors", f"--preset auto --target-size 0.3 --no-figures {FAST} --skip *.attn.*"
    with FakeCuda(grad=True):
        command("quantize", ["--ckpt", str(source), *flags.split(), "--device", "cuda", "--output", str(output)])
    command("verify", [str(output), "--against", str(source)])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_sample(sampler: str, source: Path, tmp_path: Path) -> None:
    flags = f"--ckpt {source} {STEPS} --sampler {sampler} --backend dequant"
    cpu, cuda = on_both("sample", flags, "--output .png", tmp_path)
    assert cuda.read_bytes() == cpu.read_bytes()


def test_generate_and_evaluate(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny network; `test_evaluation.py` shows that Inception runs on the GPU."""
    monkeypatch.setattr("svdit.evaluation.inception.random_extractor", Network)
    flags = f"--ckpt {source} {STEPS} --num-fid-samples 2 --per-proc-batch-size 1"
    cpu, cuda = on_both("generate", flags, "--sample-dir /set", tmp_path)
    with np.load(f"{cpu}.npz") as expected, np.load(f"{cuda}.npz") as found:
        assert np.array_equal(found["arr_0"], expected["arr_0"])
    evaluation = "--metrics fid,sfid,is --feature-extractor random --cache-dir="
    through_files = on_both("evaluate", f"--real_dir {cpu} --fake_dir {cuda} {evaluation}", "--output /out", tmp_path)
    while_sampling = on_both("generate", f"{flags} --evaluate {cpu} {evaluation}", "--sample-dir /streamed", tmp_path)
    expected_values, *others = (
        {name: entry["value"] for name, entry in json.loads((path / "metrics.json").read_text())["metrics"].items()}
        for path in (*through_files, *while_sampling)
    )
    assert len(expected_values) == 3
    for values in others:
        assert values == pytest.approx(expected_values, rel=1e-4, abs=1e-4)


def test_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_training.py` trains for longer, and draws the grid that is left out here."""
    monkeypatch.setattr("svdit.training.loop.sample_grid", lambda *arguments: None)
    monkeypatch.setitem(CONFIGS, "DiT-digits", {**CONFIGS["DiT-digits"], "depth": 1, "hidden_size": 64})
    flags = "--data digits --model DiT-digits --num-workers 0 --global-batch-size 4 --steps 1"
    cpu, cuda = on_both("train", flags, "--results-dir /run", tmp_path, grad=True)
    expected, found = (load_model(path / "ema.safetensors").state_dict() for path in (cpu, cuda))
    assert all(torch.allclose(found[name], x, atol=1e-6) for name, x in expected.items())  # of steps of 1e-4
