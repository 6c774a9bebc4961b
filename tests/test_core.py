"""Without any extra installed the core commands work; others end in one sentence with the pip command."""

import json
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


COMMANDS = """
import json, sys
from svdit.cli import main

for argv in json.loads(sys.argv[1]):
    try:
        main(argv)
    except SystemExit as end:
        sys.stderr.flush()
        print("code", end.code or 0, flush=True)
    else:
        print("code 0", flush=True)
"""
DDIM2 = "--vae=none", "--sampler=ddim", "--num-sampling-steps=2"
WORK = [
    ["--help"],
    ["inspect", "digits"],
    ["quantize", "--ckpt=digits", "--preset=rtn", "--no-figures", "--output=plain.pt"],
    ["generate", "--ckpt=digits", *DDIM2, "--num-fid-samples=4", "--sample-dir=set"],
    ["quantize", "--ckpt=digits", "--preset=rtn", "--output=noted.pt"],
]
NOTE = r"no figures: cannot import matplotlib .*pip install 'svdit\[report\]'"


def codes(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The exit codes of the commands."""
    return re.findall(r"^code (\d+)$", done.stdout, re.MULTILINE)


def test_the_core_needs_no_extra(folder: Path) -> None:
    """One after the other in one process, which imports torch once."""
    done = run(folder, COMMANDS, json.dumps(WORK))
    assert codes(done) == ["0"] * len(WORK), done.stderr
    assert len(re.findall(NOTE, done.stderr)) == 1  # of the last


FAIL = {
    "eval": ["evaluate", "--fake_dir=.", "--real_dir=.", "--feature-extractor=random", "--metrics=fid"],
    "train": ["train", "--data=digits", "--results-dir=results"],
}


def test_a_command_names_the_extra_it_needs(folder: Path) -> None:
    done = run(folder, COMMANDS, json.dumps(list(FAIL.values())))
    assert codes(done) == ["2"] * len(FAIL), done.stderr
    for line, extra in zip(done.stderr.splitlines(), FAIL, strict=True):
        assert re.fullmatch(rf"svdit \w+: cannot import .*; run: pip install 'svdit\[{extra}\]'", line)


def test_an_autoencoder_names_its_extra(folder: Path) -> None:
    code = "from svdit.model.autoencoder import load_autoencoder\nload_autoencoder('ema')"
    done = run(folder, code)
    assert "UserError: cannot import diffusers" in done.stderr.splitlines()[-1]
    assert done.stderr.rstrip().endswith("run: pip install 'svdit[vae]'")
