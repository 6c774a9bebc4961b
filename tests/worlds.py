"""Functions that are called by several processes over gloo."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from svdit.distributed import session


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _member(function: Callable[[], Any], place: int, world: int, port: int, results: Any) -> None:
    variables = {"RANK": place, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    with session(torch.device("cpu")):
        results.put((place, function()))


def in_world(world: int, function: Callable[[], Any]) -> list[Any]:
    """What `function` returns in each of `world` processes, by rank."""
    context = multiprocessing.get_context("fork")
    results, port = context.Queue(), free_port()
    members = [context.Process(target=_member, args=(function, i, world, port, results)) for i in range(world)]
    for member in members:
        member.start()
    found = dict(results.get(timeout=120) for _ in members)
    for member in members:
        member.join()
        assert member.exitcode == 0
    return [found[i] for i in range(world)]


def agent_store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


class Run:
    """Two processes that call `function` as under torchrun, without its start and theirs, which take seconds.

    `end` returns their exit codes and what they wrote to stderr.
    """

    def __init__(self, function: Callable[[], object], folder: Path, store: TCPStore | None = None) -> None:
        self.store = store or agent_store()
        self.errors = folder / "stderr"
        context = multiprocessing.get_context("fork")
        self.members = [context.Process(target=self.member, args=(function, place)) for place in range(2)]
        for member in self.members:
            member.start()

    def member(self, function: Callable[[], object], place: int) -> None:
        names = {"RANK": place, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port}
        os.environ.update({name: str(value) for name, value in names.items()}, TORCHELASTIC_USE_AGENT_STORE="True")
        os.dup2(os.open(self.errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.stderr = os.fdopen(2, "w")
        torch.set_num_threads(1)
        function()

    def kill(self, place: int, number: int) -> None:
        os.kill(self.members[place].pid or 0, number)

    def end(self) -> tuple[list[int | None], list[str]]:
        for member in self.members:
            member.join(60)
        codes = [member.exitcode for member in self.members]
        for member in self.members:
            member.kill()
        return codes, self.errors.read_text().splitlines()
