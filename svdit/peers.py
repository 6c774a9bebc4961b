"""The processes of one run under torchrun: the first failure is reported once, and nobody waits for one that is gone.

Every process counts upwards in the run's store, however long its work is, and watches the count of the next one.
"""

import os
import threading
import time
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import NoReturn

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from svdit.files import remove_unfinished
from svdit.printing import write_error

INTERVAL = 2.0  # seconds between two looks
FROZEN, ABSENT = 60, 300  # looks at the same count until a process counts as frozen, or as never started
PATIENCE = 3.0  # seconds in which a process ends by itself after another one failed
POLL = 0.05
TOGETHER = 10.0  # seconds in which all end; torchrun terminates the others when the first one exits
REPORT = 30.0  # seconds that a failed process has to print its message, while it still cleans up


def processes() -> int:
    """The number of processes of the run, also before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1


def connect() -> Store:
    """A connection to the run's store. Raises RuntimeError where there is none, or its process is gone."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=TOGETHER))
    return PrefixStore(f"svdit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def first_to_fail() -> bool:
    """Whether no process of the run has failed before this one, which fails now."""
    return processes() == 1 or _first_of_several()


@cache
def _first_of_several() -> bool:
    with suppress(RuntimeError):
        return connect().add("failed", 1) == 1
    return os.environ.get("RANK", "0") == "0"


def report(line: str) -> None:
    """Print the line, unless another process has failed before."""
    if first_to_fail():
        write_error(line)
        if processes() > 1:
            with suppress(RuntimeError):
                connect().add("reported", 1)


def fail(line: str) -> NoReturn:
    """Print the line, unless another process has failed before, and exit with code 2, together with the others."""
    report(line)
    end = time.monotonic() + TOGETHER
    with suppress(RuntimeError):
        store = connect()
        while store.add("failed", 0) < processes() and time.monotonic() < end:
            time.sleep(POLL)
    exit_now()


def exit_now() -> NoReturn:
    """Exit with code 2, also from a thread, and before torchrun terminates what is still cleaning up."""
    remove_unfinished()
    os._exit(2)


class Watch(threading.Thread):
    """Ends this process when another one has failed, died or is frozen, even where it waits in a collective."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()

    def run(self) -> None:
        """Look until `done` is set."""
        place = int(os.environ["RANK"])
        neighbour = (place + 1) % processes()
        last = silent = 0
        try:
            store = connect()
            while not self.done.wait(INTERVAL):
                store.add(f"alive/{place}", 1)
                count = store.add(f"alive/{neighbour}", 0)
                silent = silent + 1 if count == last else 0  # not by the clock: all may have been suspended
                last = count
                if store.add("failed", 0):
                    self.await_report(store)
                    self.end("")
                if silent >= (FROZEN if count else ABSENT):
                    self.end(f"process {neighbour} of {processes()} does not respond; end it, then")
        except RuntimeError:
            self.end("the first process of this run is gone; see its messages, then")

    def await_report(self, store: Store) -> None:
        """Wait until the process that failed has printed its message: when this one ends, torchrun ends that one."""
        end = time.monotonic() + REPORT
        while not store.add("reported", 0) and not self.done.wait(POLL) and time.monotonic() < end:
            pass

    def end(self, problem: str) -> None:
        """End the process, unless it does so by itself; without a problem another process has reported it."""
        if self.done.wait(PATIENCE):
            return
        if problem:
            report(f"svdit: {problem} run the same command again")
        exit_now()
