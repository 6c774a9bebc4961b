"""docs/scale.md: its arithmetic; its recipes' syntax, options, and runs with stand-ins for SLURM's commands."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layers import CONFIGS
from pixels import pixel_model
from torch.distributed.run import get_args_parser
from torch.utils.flop_counter import FlopCounterMode
from worlds import free_port

from svdit.checkpoints.store import save_model
from svdit.cli import command, parser
from svdit.model.dit import DiT, DiTConfig
from svdit.quant.quantize import quantize_
from svdit.shims import allow_cpu_torchvision

allow_cpu_torchvision()
from diffusers import AutoencoderKL  # noqa: E402

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scale.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
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


def gmac(call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 2e9


@pytest.fixture(scope="module")
def counted() -> dict[int, tuple[float, float]]:
    """GMAC of a forward pass of DiT-XL/2 and of decoding, by the size of the image."""
    stages, counts = 4, {}
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * stages,
            up_block_types=("UpDecoderBlock2D",) * stages,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        for size in (256, 512):
            model, z = DiT(DiTConfig(input_size=size // 8)), torch.empty(1, 4, size // 8, size // 8)
            labels = torch.zeros(1, dtype=torch.int64)
            counts[size] = gmac(lambda: model(z, torch.zeros(1), labels)), gmac(lambda: vae.decode(z))  # noqa: B023
    return counts


def check_time(cell: str, seconds: float) -> None:
    """`cell`, "2.1 h" or "16 min", is the time up to its last digit."""
    text, unit = cell.split()
    value, last = float(text), 10 ** -len(text.partition(".")[2])
    assert abs(seconds / {"h": 3600, "min": 60}[unit] - value) <= 0.51 * last, cell


def table(heading: str) -> list[list[str]]:
    """The rows of the table with this heading."""
    rows = PAGE[PAGE.index(f"| {heading} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_times_on_gpus_follow_from_the_operations(counted: dict[int, tuple[float, float]]) -> None:
    (forward, decode), (large_forward, large_decode) = counted[256], counted[512]
    text = " ".join(PAGE.split())
    assert f"has {forward:.1f} GMAC at 256 px and {large_forward:.1f} GMAC at 512 px" in text
    assert f"the VAE {decode:.0f} and {large_decode:.0f} GMAC" in text
    rows = table("50 000 images")
    assert len(rows) == 4
    for name, flop, *times in rows:
        size, _, _, steps = name.replace(" (default)", "").split()
        forward, decode = counted[int(size)]
        total = 50_000 * (2 * int(steps) * forward + decode) * 2e9
        assert flop == f"{total / 1e18:.3g}"
        for cell, gpus in zip(times, (1, 8, 64), strict=True):
            check_time(cell, total / 100e12 / gpus)


def test_the_times_on_cpus_follow_from_the_measured_rows() -> None:
    step, whole, rest = map(float, re.findall(r"(\d\.\d+) s(?: per image|\s+for all)", PAGE))
    assert abs(whole - 20 * step - rest) < 0.01
    for name, hours, *times in table("50 000 images of 256 px, W8A8"):
        seconds = 2 * 50_000 * (int(name.split()[1]) * step + rest)
        assert abs(seconds / 3600 - float(hours)) <= 50
        for cell, cores in zip(times, (64, 16 * 64), strict=True):
            check_time(cell, seconds / cores)


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
