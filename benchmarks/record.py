"""Appends a measurement to `results.csv` with its date, commit, machine and versions.

    record("evaluation", "inception_fast", 28.8, "images/s", note="batch 32, 256 px")

The machine is recorded as the processor's name, family and model, and the number of cores, without a host name.
"""

import csv
import os
import platform
import subprocess
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = ["date", "commit", "machine", "versions", "benchmark", "name", "value", "unit", "note"]


def record(benchmark: str, name: str, value: float, unit: str, note: str = "", path: Path = RESULTS) -> None:
    """Append one number and print it."""
    measured = [benchmark, name, f"{value:.6g}", unit, note]
    row = [date.today().isoformat(), commit(), machine(), versions(), *measured]
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, row] if new else [row])
    print(f"{benchmark:14} {name:40} {value:12.6g} {unit:12} {note}", flush=True)


def commit() -> str:
    """The short commit hash, with a plus if tracked files differ from it; empty outside a repository."""
    try:
        return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=True).stdout.strip()


def machine() -> str:
    """The processor, the cores this process may use, and the GPU if there is one."""
    import torch

    from svdit.kernels.cpu.features import processor

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{processor()}, {cores} cores, {torch.get_num_threads()} threads"
    return f"{text}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else text


def versions() -> str:
    """Versions of Python and torch."""
    import torch

    return f"python {platform.python_version()}, torch {torch.__version__}"
