"""Collectives that also work in a single process, without torchrun.

with session():                  # joins torchrun's process group, if there is one
    for i in shard(n): ...       # rank, rank + world size, …: no padding, no duplicates
    for i in claimed(n): ...     # the same numbers, as many of them as this process has time for
    barrier()
"""

import gc
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import repeat, takewhile
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from svdit import restarts
from svdit.errors import UserError, lost_connection, sentence
from svdit.files import exclusive, sha256
from svdit.peers import (
    ABSENT,
    INTERVAL,
    Watch,
    await_termination,
    connect,
    first_to_fail,
    missing,
    processes,
)

LATE = 30.0  # seconds until a new file is seen on all hosts: NFS caches folders
T = TypeVar("T")


@contextmanager
def session(device: torch.device | None = None) -> Iterator[None]:
    """Join torchrun's process group (nccl on CUDA, gloo otherwise) and leave it at the end.

    On "cuda" without an index every process uses its own GPU. Raises UserError for an incomplete environment.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    watch = Watch()
    if several or restarts.under_torchrun():
        watch.start()
        restarts.announce()
    if several:
        join(default_device() if device in (None, torch.device("cuda")) else device)
    try:
        yield
        barrier()  # a process that has ended would look like one that failed
    except Exception as error:
        if lost_connection(error):
            await_termination()
        first_to_fail()  # before the others see the closed connection
        raise
    finally:
        watch.done.set()
        if several:
            gc.collect()  # frees users of the group first, including reference cycles of DistributedDataParallel
            dist.destroy_process_group()


def join(device: torch.device) -> None:
    """Join the process group. Raises UserError for an incomplete environment.

    Not by torch's own connection: it would find the addresses of the processes before a restart.
    """
    if unset := missing():
        raise UserError(f"WORLD_SIZE is set, but {unset[0]} is not; use torchrun, or set both")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = connect(wait=ABSENT * INTERVAL)
    patience = timedelta(days=1)  # the first to finish waits for the slowest
    store.set_timeout(patience)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=patience,
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=processes(),
    )


def default_device() -> torch.device:
    """This process's GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def named_device(name: str | torch.device | None) -> torch.device:
    """The device called `name`; for None and "cuda" the GPU of this process. Raises UserError if it is unavailable."""
    if isinstance(name, torch.device):
        return name
    if name is None or (name == "cuda" and torch.cuda.is_available()):
        return default_device()
    if not re.fullmatch(r"cpu(:0)?|cuda(:[0-9]{1,4})?", name):
        raise UserError(f"device {name!r} is not supported; choose cpu, cuda or cuda:1, or omit it")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} is unavailable ({reason}); omit it or choose cpu") from None


def rank() -> int:
    """Index of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def shard(count: int) -> range:
    """The indices below `count` that this process computes."""
    return range(rank(), count, world_size())


class Counter:
    """A number that every process of the session adds to; all create it together. It starts at 0."""

    def __init__(self) -> None:
        self.key, self.value = on_first(lambda: uuid4().hex), 0
        self.store = connect() if world_size() > 1 else None

    def add(self, n: int) -> int:
        """The sum after adding n; 0 reads it."""
        self.value = self.value + n if self.store is None else self.store.add(self.key, n)
        return self.value


def claimed(count: int) -> Iterator[int]:
    """The numbers below `count` that this process is the first to claim: a faster one gets more of them."""
    claims = Counter()
    return takewhile(lambda n: n < count, (claims.add(1) - 1 for _ in repeat(None)))


def all_sum(x: Tensor) -> Tensor:
    """Sum `x` (…) over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather(value: Any) -> list[Any]:
    """The picklable `value` of every process, in rank order, on every process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_first(function: Callable[[], T]) -> T:
    """The picklable result of `function`, called by the first process, on every process; so is its UserError."""
    result: Any = None
    problem: UserError | None = None
    if rank() == 0:
        try:
            result = function()
        except Exception as error:
            if (message := sentence(error)) is None:
                raise
            problem = UserError(message)
    result, problem = gather((result, problem))[0]
    if problem:
        raise problem
    return result


def seen(look: Callable[[], bool]) -> bool:
    """Whether `look` is true, at the latest when every host sees what others have written."""
    end = time.monotonic() + LATE
    while not (found := look()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def check_shared(path: Path) -> None:
    """Raises UserError, on every process, unless all see the same file where the first one has written `path`."""
    content = on_first(lambda: sha256(path))
    sees_it = seen(lambda: path.exists() and sha256(path) == content)
    blind = {host: None for host, sees in gather((socket.gethostname(), sees_it)) if not sees}
    if blind:
        raise UserError(f"{path} is not the same file on {', '.join(blind)}; choose a folder that all hosts share")


@contextmanager
def reserved(*outputs: str | Path) -> Iterator[None]:
    """`files.exclusive`, held by the first process for all. Every process raises UserError where another job writes."""
    with ExitStack() as locks:
        on_first(lambda: locks.enter_context(exclusive(*outputs)))
        yield
