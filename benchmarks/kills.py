"""Images lost and changed by killed runs: sets drawn through many kills, compared with undisturbed ones.

    python benchmarks/kills.py [KILLS [FORM …]]

For every form of a set (files, tar shards, .npz) draws images of the quantized digits model with `sample_ddp.py` under
torchrun, kills the run at a random time and starts it again with another number of processes and another batch size.
A kill ends everything (SIGKILL), asks torchrun to end (SIGTERM), or ends one process of several (SIGKILL), after
which the others must end by themselves. The last run is left alone. Prints one row per form.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
FORMS = {"png": [], "tar": ["--tar"], "npz": ["--no-png"]}
IMAGES, LONGEST = 2000, 25.0  # seconds until a kill
QUANTIZE = "--ckpt digits --preset w8a8 --calib-images 8 --calib-steps 5 --no-figures"
SAMPLE = f"--num-fid-samples {IMAGES} --num-sampling-steps 40 --vae none"


def quantize(checkpoint: Path) -> None:
    """Write the quantized digits model."""
    arguments = [sys.executable, "quantize_ptq.py", *QUANTIZE.split(), "--output", str(checkpoint)]
    subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True)


def script(checkpoint: Path, folder: Path, form: str, batch: int) -> list[str]:
    """The script and its arguments."""
    where = ["--ckpt", str(checkpoint), "--sample-dir", str(folder), "--per-proc-batch-size", str(batch)]
    return ["sample_ddp.py", *where, *SAMPLE.split(), *FORMS[form]]


def command(checkpoint: Path, folder: Path, form: str, world: int, batch: int) -> list[str]:
    """One run of `world` processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return [*torchrun, *script(checkpoint, folder, form, batch)]


def members(group: int) -> list[int]:
    """The processes that draw: children of the group's leader."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(group)], capture_output=True, text=True).stdout
    return [int(pid) for pid in listed.split()]


def disturbed(arguments: list[str], kind: str, delay: float) -> tuple[bool, float]:
    """Start a run and kill it after a delay: whether it was still running, and the seconds until all had ended."""
    run = subprocess.Popen(
        arguments, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        run.wait(delay)
        return False, 0.0
    except subprocess.TimeoutExpired:
        start = time.monotonic()
    if kind == "one process" and (pids := members(run.pid)):
        os.kill(random.choice(pids), signal.SIGKILL)
    elif kind == "SIGTERM":
        run.terminate()
    else:
        os.killpg(run.pid, signal.SIGKILL)
    run.wait(120)
    while members(run.pid):
        time.sleep(0.1)
    return True, time.monotonic() - start


def pixels(npz: Path) -> np.ndarray:
    """(N, H, W, 3)"""
    with np.load(npz) as archive:
        return archive["arr_0"]


def strays(folder: Path, reference: Path) -> list[str]:
    """Files that an undisturbed run does not leave, and those that it leaves and this one lacks."""

    def files(top: Path) -> set[str]:
        return {str(path.relative_to(top)) for path in top.rglob("*")}

    return sorted(files(folder) ^ files(reference))


def main(kills: int, forms: list[str]) -> None:
    """Print the table."""
    random.seed(0)
    print("| form | kills | runs with 1, 2, 3 processes | lost | changed | strays | longest end, s |")
    print("|---" * 7 + "|")
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(temporary) / "w8a8.safetensors"
        quantize(checkpoint)
        for form in forms:
            reference, folder = Path(temporary) / f"{form}-reference", Path(temporary) / f"{form}-killed"
            subprocess.run(
                command(checkpoint, reference / "set", form, 1, 32), cwd=ROOT, check=True, capture_output=True
            )
            done, worlds, ends = 0, [0, 0, 0], [0.0]
            for kill in range(kills):
                kind = ("SIGKILL", "one process", "SIGTERM")[kill % 3]
                world = random.randint(2 if kind == "one process" else 1, 3)
                arguments = command(checkpoint, folder / "set", form, world, random.choice((1, 4, 8)))
                killed, seconds = disturbed(arguments, kind, random.uniform(5, LONGEST))
                done, worlds[world - 1] = done + killed, worlds[world - 1] + 1
                ends.append(seconds)
            subprocess.run(command(checkpoint, folder / "set", form, 2, 8), cwd=ROOT, check=True, capture_output=True)
            expected, actual = pixels(reference / "set.npz"), pixels(folder / "set.npz")
            changed = int((expected[: len(actual)] != actual).any((1, 2, 3)).sum())
            left = strays(folder, reference)
            row = (form, done, worlds, len(expected) - len(actual), changed, len(left), round(max(ends), 1))
            print(f"| {' | '.join(map(str, row))} |", *left, flush=True)


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["9"])[0]), sys.argv[2:] or list(FORMS))
