"""The recipes of docs/scale.md: shell syntax, existing options, and runs with stand-ins for SLURM's commands."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layers import CONFIGS
from pixels import pixel_model
from torch.distributed.run import get_args_parser
from worlds import free_port

from svdit.checkpoints.store import save_model
from svdit.cli import command, parser
from svdit.quant.quantize import quantize_

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "scale.md").read_text(), re.DOTALL)
SCRIPTS = [block for block in BLOCKS if block.startswith("#!")]
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = {"sample_ddp.py": "generate", "evaluate_metrics.py": "evaluate"}


def words(line: str) -> list[str]:
    """The words of a command, up to what follows it."""
    return list(map(os.path.expandvars, shlex.split(re.split(r" &&? |&$", line.strip())[0], comments=True)))


@pytest.mark.parametrize("block", BLOCKS)
def test_bash_accepts_it(block: str) -> None:
    assert subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True).stderr == ""


@pytest.mark.parametrize("script", COMMANDS)
def test_options_exist(script: str) -> None:
    lines = [line for line in LINES if script in line]
    assert len(lines) >= 2
    for line in lines:
        options = words(line)
        parser(COMMANDS[script]).parse_args(options[options.index(script) + 1 :])


def test_torchruns_options_exist() -> None:
    lines = [words(line[line.index("torchrun") :]) for line in LINES if "torchrun" in line]
    assert len(lines) >= 4
    for line in lines:
        assert get_args_parser().parse_args(line[1:]).training_script == "sample_ddp.py"


# On this machine srun starts its command twice, and the only host is 127.0.0.1.

SRUN = """while [[ $1 == -* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || exit; done"""
STAND_INS = {"srun": SRUN, "scontrol": "echo 127.0.0.1", "scancel": ""}
SMALL = "--num-fid-samples 12 --num-sampling-steps 4 --device cpu --per-proc-batch-size 4"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with stand-ins, a link to the repository, and a small quantized model as w8a8.safetensors."""
    programs, activate = tmp_path / "bin", tmp_path / "svdit" / ".venv" / "bin" / "activate"
    programs.mkdir()
    for name, code in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{code}\n")
        (programs / name).chmod(0o755)
    activate.parent.mkdir(parents=True)
    activate.write_text(f"PATH={programs}:{Path(sys.executable).parent}:$PATH; export PYTHONPATH={ROOT}")
    (tmp_path / "svdit" / "sample_ddp.py").symlink_to(ROOT / "sample_ddp.py")
    model = pixel_model()
    inputs = torch.randn(4, 3, 8, 8), torch.tensor([0, 250, 500, 999]), torch.arange(4)
    quantize_(model, CONFIGS["w8a8"], lambda model: model(*inputs))
    save_model(model, tmp_path / "svdit" / "w8a8.safetensors")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_draw_the_images_of_one_process(script: str, home: Path) -> None:
    local = 1 if "srun" in script else 2
    code = script.replace("--num-fid-samples 50000", SMALL).replace("--nproc-per-node=gpu", f"--nproc-per-node={local}")
    variables = {
        "JOB_ID": free_port() % 10000,
        "JOB_NODELIST": "here",
        "ARRAY_JOB_ID": 1,
        "NNODES": 2,
        "NTASKS": 2,
        "CPUS_PER_TASK": 1,
    }
    environment = os.environ | {f"SLURM_{key}": str(value) for key, value in variables.items()}
    environment |= {"HOME": str(home), "SCRATCH": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-euc", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    checkpoint = ["--ckpt", str(home / "svdit" / "w8a8.safetensors")]
    command("generate", [*checkpoint, *SMALL.split(), "--sample-dir", str(home / "alone")])
    assert (home / "w8a8.npz").read_bytes() == (home / "alone.npz").read_bytes()
