"""Two torchrun agents on this machine, one killed with its process and started again: what happens, and when.

    python benchmarks/two_agents.py

Draws images of the quantized digits model on both, by the options of docs/scale.md for several hosts. Prints the events
with their seconds, the log of the first agent, and whether files and bytes are those of one process.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kills import ROOT, command, members, quantize, script

RENDEZVOUS = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=two"]
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
START = time.monotonic()


def event(text: str) -> None:
    """Print it with the seconds since the start."""
    print(f"{time.monotonic() - START:5.0f}  {text}", flush=True)


def until(condition: Callable[[], object]) -> None:
    """Wait for it, two minutes at most."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def images(folder: Path) -> int:
    """The number of images drawn so far."""
    return len(list(folder.glob("*.png")))


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a set, and its .npz."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {".npz": folder.with_suffix(".npz").read_bytes()}


def main() -> None:
    """Start A; start B; kill B; start B again; wait."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, folder, log = (Path(temporary) / name for name in ("w8a8.safetensors", "two", "a.log"))
        alone = Path(temporary) / "alone"
        quantize(checkpoint)
        torchrun = [sys.executable, "-m", "torch.distributed.run", *RENDEZVOUS, f"--rdzv-endpoint=127.0.0.1:{port}"]

        def agent(output: Path) -> subprocess.Popen[bytes]:
            with output.open("w") as file:
                return subprocess.Popen(
                    [*torchrun, *script(checkpoint, folder, "png", 4)],
                    cwd=ROOT,
                    start_new_session=True,
                    stdout=file,
                    stderr=file,
                    env={**os.environ, **ENVIRONMENT},
                )

        event("A started")
        a = agent(log)
        until(lambda: images(folder) > 0)
        event("A draws; B started")
        b = agent(Path(temporary) / "b.log")
        until(lambda: "world size 2" in log.read_text())
        event("both start")
        drawn = images(folder)
        until(lambda: images(folder) >= drawn + 50)
        for pid in (b.pid, *members(b.pid)):
            os.killpg(pid, signal.SIGKILL)
        event(f"B and its process killed, {images(folder)} images")
        until(lambda: "does not respond" in log.read_text())
        event("A's process ends")
        until(lambda: "restart 1 of at most 3" in log.read_text())
        event("A starts again")
        drawn = images(folder)
        until(lambda: images(folder) > drawn)
        event("A draws; B started again")
        b = agent(Path(temporary) / "b.log")
        codes = a.wait(600), b.wait(600)
        event(f"finished, exit codes {codes[0]} and {codes[1]}")
        print(log.read_text())
        subprocess.run(command(checkpoint, alone, "png", 1, 32), cwd=ROOT, check=True, capture_output=True)
        same = content(folder) == content(alone)
        print("files and bytes are those of one process" if same else "the files DIFFER from those of one process")


if __name__ == "__main__":
    main()
