"""Functions that are called by several processes over gloo."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

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
