"""Elastic runs: torchrun's agents and workers are killed and come back, and the images are those of one process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import gated
import pytest
import torch
from layers import CONFIGS
from pixels import ROOT, pixel_model
from worlds import free_port

from svdit.checkpoints.store import save_model
from svdit.cli import command
from svdit.quant.quantize import quantize_

COUNT = 40
ELASTIC = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=elastic"]
QUICK = "--rdzv-conf=last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=5"  # lost after 5 s, not 15
PATIENCE = 120.0


class Agent:
    """torchrun, which draws `folder`/set as far as `folder`/limit allows; its output is in `folder`/NAME.log."""

    def __init__(self, folder: Path, name: str, *options: str) -> None:
        self.log = folder / f"{name}.log"
        script = [gated.__file__, str(folder / "limit"), str(folder / "set"), *arguments(folder)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *options, *script],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(ROOT),
                    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(int("--standalone" not in options)),
                },
            )

    def workers(self) -> list[int]:
        """Their process ids, which are those of their process groups."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def kill(self) -> None:
        """As a host that fails: the agent first, or it would start new workers."""
        workers = self.workers() if self.process.poll() is None else []
        for pid in (self.process.pid, *workers):
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.process.wait()

    def starts(self, line: str) -> int:
        """How often its first process has noted this."""
        return self.log.read_text().count(f"note: {line}")


def arguments(folder: Path) -> list[str]:
    fast = ["--num-sampling-steps", "4", "--device", "cpu", "--per-proc-batch-size", "2"]
    return ["--ckpt", str(folder / "w8a8.safetensors"), "--num-fid-samples", str(COUNT), "--image-size", "8", *fast]


Start = Callable[..., Agent]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start an agent; it and its workers are killed at the end."""
    model, agents = pixel_model(), list[Agent]()
    inputs = torch.randn(4, 3, 8, 8), torch.tensor([0, 250, 500, 999]), torch.arange(4)
    quantize_(model, CONFIGS["w8a8"], lambda model: model(*inputs))
    save_model(model, tmp_path / "w8a8.safetensors")

    def start(name: str, *options: str) -> Agent:
        agents.append(Agent(tmp_path, name, *options))
        return agents[-1]

    yield start
    for agent in agents:
        agent.kill()


def until(condition: Callable[[], bool], *agents: Agent) -> None:
    """Wait for an event; the logs of the agents tell why it does not come."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "\n".join(agent.log.read_text() for agent in agents)
        time.sleep(0.05)


def allow(folder: Path, images: int) -> None:
    """Let the workers generate until there are so many images."""
    (folder / "next").write_text(str(images))
    (folder / "next").replace(folder / "limit")


def generated(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def check(folder: Path, *agents: Agent) -> None:
    """Both succeed; the images and the .npz are those of one process, and no other file is there."""
    allow(folder, COUNT)
    until(lambda: all(agent.process.poll() is not None for agent in agents), *agents)
    assert [agent.process.returncode for agent in agents] == [0] * len(agents), agents[0].log.read_text()
    command("generate", [*arguments(folder), "--sample-dir", str(folder / "alone")])
    alone, together = folder / "alone", folder / "set"
    assert {path.name for path in together.iterdir()} == {path.name for path in alone.iterdir()}
    assert generated(together) == generated(alone)
    assert (folder / "set.npz").read_bytes() == (folder / "alone.npz").read_bytes()
    logs = {agent.log.name for agent in agents} | {"b.log"}
    assert {path.name for path in folder.iterdir()} - logs == {
        *("set", "set.npz", "alone", "alone.npz", "w8a8.safetensors", "limit")
    }


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_an_agent_joins_and_dies_and_another_comes(tmp_path: Path, start: Start, again: bool) -> None:
    options = [*ELASTIC, QUICK, f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    images = tmp_path / "set"
    allow(tmp_path, 4)
    first = start("a", *options)
    until(lambda: len(generated(images)) >= 4, first)
    second = start("b", *options)
    until(lambda: first.starts("world size 2, hosts 2") == 1, first, second)
    allow(tmp_path, 12)
    until(lambda: len(generated(images)) >= 12, first, second)
    second.kill()
    until(lambda: first.starts("world size 1, hosts 1") == 2, first)
    agents = [first]
    if again:
        allow(tmp_path, 20)
        until(lambda: len(generated(images)) >= 20, first)
        agents.append(start("c", *options))
        until(lambda: first.starts("world size 2, hosts 2") == 2, *agents)
    check(tmp_path, *agents)


@pytest.mark.slow
def test_a_killed_worker_is_started_again(tmp_path: Path, start: Start) -> None:
    allow(tmp_path, 8)
    agent = start("a", "--standalone", "--nproc-per-node=2", "--max-restarts=2")
    until(lambda: len(generated(tmp_path / "set")) >= 8, agent)
    os.kill(agent.workers()[1], signal.SIGKILL)
    until(lambda: agent.starts("world size 2, hosts 1; restart 1 of at most 2") == 1, agent)
    check(tmp_path, agent)
    assert "Traceback" not in agent.log.read_text()
