"""The documented commands, parsed from the README and run from the repository's root as a user would."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scripts import run_script

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
DOCUMENTED = [line for line in BLOCKS[1][1].splitlines() if line]
SMALL = [  # replaces the published weights by the embedded model, and large numbers by small ones
    ("pretrained_models/DiT-XL-2-256x256.pt", "digits"),
    ("DiT-XL/2", "DiT-digits"),
    ("--image-size 256", "--image-size 8"),
    ("--num-classes 1000", "--num-classes 10"),
    ("--num-fid-samples 5000", "--num-fid-samples 6"),
    ("--num_images 5000", "--num_images 6"),
    ("--nproc_per_node=4", "--nproc_per_node=2"),
]


def small(line: str, folder: Path) -> str:
    for old, new in [
        *SMALL,
        ("./generated", f"{folder}/generated"),
        ("quantized_model.pt", f"{folder}/quantized_model.pt"),
    ]:
        line = line.replace(old, new)
    return line.replace("/path/to/", f"{folder}/")


def run(line: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a process of its own, with this Python and one thread."""
    words = shlex.split(line)
    start = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [*start, *words[1:], *more]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def again(line: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the line, in a fork of this process: another test shows that it starts alone."""
    words = shlex.split(line)
    script = words.index("sample_ddp.py") if "torchrun" in words else 1
    return run_script(*words[script:], *more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all outputs, with the quantized model, which the README makes first."""
    folder = tmp_path_factory.mktemp("documented")
    done = run(small(DOCUMENTED[2], folder))
    assert done.returncode == 0, done.stderr
    return folder


def test_the_readme_contains_the_documented_commands_verbatim() -> None:
    assert DOCUMENTED == [
        "python sample.py --image-size 256 --seed 1",
        "python sample.py --model DiT-XL/2 --image-size 256 --ckpt pretrained_models/DiT-XL-2-256x256.pt",
        "python quantize_ptq.py --ckpt pretrained_models/DiT-XL-2-256x256.pt --model DiT-XL/2 --num-classes 1000 "
        "--rank-ratio 0.95 --num-bits 8 --output quantized_model.pt",
        "torchrun --nnodes=1 --nproc_per_node=4 sample_ddp.py --model DiT-XL/2 --ckpt quantized_model.pt "
        "--num-fid-samples 5000 --image-size 256 --rank-ratio 0.95 --sample-dir ./generated",
        "python evaluate_metrics.py --real_dir /path/to/real --fake_dir /path/to/generated --num_images 5000",
    ]
    assert "from models import DiT_models, SVDLinear, apply_svd_to_dit" in README
    assert "conda env create -f environment.yml" in README


@pytest.mark.parametrize("line", DOCUMENTED[:2])
def test_sample(line: str, tmp_path: Path) -> None:
    more, start = ([], again) if "--ckpt" in line else (["--ckpt", "digits"], run)
    output = tmp_path / "sample.png"
    done = start(small(line, tmp_path), *more, "--num-sampling-steps", "4", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(output)).std() > 10


def test_quantize(folder: Path) -> None:
    size = (folder / "quantized_model.pt").stat().st_size
    assert 1e6 < size < 4e6


def test_generate_then_evaluate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(small(DOCUMENTED[3], folder), "--num-sampling-steps", "4")
    assert done.returncode == 0, done.stderr
    assert np.load(folder / "generated.npz")["arr_0"].shape == (6, 8, 8, 3)
    (folder / "generated").rename(folder / "real")
    done = again(small(DOCUMENTED[3], folder), "--num-sampling-steps", "4", "--global-seed", "1")
    assert done.returncode == 0, done.stderr
    evaluate = small(DOCUMENTED[4], folder)
    monkeypatch.delenv("SVDIT_INCEPTION_WEIGHTS", raising=False)
    done = again(evaluate)
    if done.returncode:  # no Inception weights on this machine
        assert done.returncode == 2
        assert "--feature-extractor random" in done.stderr
        assert "Traceback" not in done.stderr
    done = run(evaluate, "--feature-extractor", "random", "--cache-dir", "")
    assert done.returncode == 0, done.stderr
    assert "NOT comparable" in done.stdout


def test_a_rank_ratio_other_than_the_checkpoints_is_an_error(folder: Path) -> None:
    line = small(DOCUMENTED[3], folder).replace("--rank-ratio 0.95", "--rank-ratio 0.5")
    done = again(line)
    assert done.returncode == 2
    assert "0.95" in done.stderr
    assert "0.5" in done.stderr


def test_the_python_example_runs() -> None:
    example = next(text for language, text in BLOCKS if language == "python" and "from models import" in text)
    done = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_offline_examples_run(tmp_path: Path) -> None:
    for line in BLOCKS[3][1].splitlines():
        line = line.replace("digits-w4a8", f"{tmp_path}/digits-w4a8").replace(
            "--sample-dir ", f"--sample-dir {tmp_path}/"
        )
        more = ["--output", f"{tmp_path}/sample.png"] if "sample.py" in line else []
        done = run(line, *more)
        assert done.returncode == 0, done.stderr


def test_conda_environment_installs_the_exact_versions() -> None:
    text = (ROOT / "environment.yml").read_text()
    assert text.startswith("name: DiT\n")
    assert "--constraint constraints.txt" in text
    assert "--editable .[all]" in text
    constraints = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in constraints)
    assert "torch==2.13.0" in constraints


@pytest.mark.parametrize("name", ["sample", "sample_ddp", "quantize_ptq", "evaluate_metrics", "train"])
def test_help_answers_without_torch(name: str) -> None:
    code = f"import sys, runpy; sys.argv = ['{name}.py', '--help']\n"
    code += f"try: runpy.run_path('{name}.py', run_name='__main__')\n"
    code += "except SystemExit as end: assert end.code == 0\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: svdit" in done.stdout
