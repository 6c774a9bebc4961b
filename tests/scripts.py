"""The scripts in the repository's root, without the seconds in which a new process imports torch."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

import torch

ROOT = Path(__file__).parents[1]


def run_script(name: str, *argv: str) -> "CompletedProcess[str]":
    """Run one of them as `python NAME.py ARGV` does, in a fork of this process."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, stream) for stream in ("stdout", "stderr")]
        process = multiprocessing.get_context("fork").Process(target=_script, args=(name, argv, outputs))
        process.start()
        process.join(300)
        process.kill()
        process.join()
        code = process.exitcode
        assert code is not None
        return CompletedProcess([name, *argv], code, *(path.read_text(encoding="utf-8") for path in outputs))


def _script(name: str, argv: list[str], outputs: list[Path]) -> None:
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.argv = [name, *argv]
    runpy.run_path(name, run_name="__main__")
