"""Without any extra installed the core commands work; others end in one sentence with the pip command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from svdit.extras import EXTRAS

ROOT = Path(__file__).parents[1]
HIDE = f"""
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
HIDDEN = {(*EXTRAS, "huggingface_hub", "triton")}

def visible(name, *rest):
    hidden = name.partition(".")[0] in HIDDEN or name == "torch._dynamo"  # torch's compiler, seconds of imports
    return None if hidden else find_spec(name, *rest)

PathFinder.find_spec = visible
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose sitecustomize.py hides every optional package, and torch's compiler."""
    folder = tmp_path_factory.mktemp("core")
    (folder / "sitecustomize.py").write_text(HIDE)
    return folder


def run(folder: Path, code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in `folder`, with the packages hidden."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, "-c", code, *argv], env=environment, cwd=folder, capture_output=True, text=True
    )


COMMAND = "from svdit.cli import main; main()"
DDIM2 = "--vae=none", "--sampler=ddim", "--num-sampling-steps=2"
WORK = {
    "help": ["--help"],
    "inspect": ["inspect", "digits"],
    "quantize": ["quantize", "--ckpt=digits", "--preset=rtn", "--no-figures", "--output=plain.pt"],
    "quantize with figures": ["quantize", "--ckpt=digits", "--preset=rtn", "--output=noted.pt"],
    "generate": ["generate", "--ckpt=digits", *DDIM2, "--num-fid-samples=4", "--sample-dir=set"],
}


@pytest.mark.parametrize("name", WORK)
def test_the_core_needs_no_extra(folder: Path, name: str) -> None:
    done = run(folder, COMMAND, *WORK[name])
    assert done.returncode == 0, done.stderr
    notes = re.findall("no figures: cannot import matplotlib .*pip install 'svdit\\[report\\]'", done.stderr)
    assert len(notes) == (name == "quantize with figures")


FAIL = {
    "eval": ["evaluate", "--fake_dir=.", "--real_dir=.", "--feature-extractor=random", "--metrics=fid"],
    "train": ["train", "--data=digits", "--results-dir=results"],
}


@pytest.mark.parametrize("extra", FAIL)
def test_a_command_names_the_extra_it_needs(folder: Path, extra: str) -> None:
    done = run(folder, COMMAND, *FAIL[extra])
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf"svdit \w+: cannot import .*; run: pip install 'svdit\[{extra}\]'\n", done.stderr)


def test_an_autoencoder_names_its_extra(folder: Path) -> None:
    code = "from svdit.model.autoencoder import load_autoencoder\nload_autoencoder('ema')"
    done = run(folder, code)
    assert "UserError: cannot import diffusers" in done.stderr.splitlines()[-1]
    assert done.stderr.rstrip().endswith("run: pip install 'svdit[vae]'")
