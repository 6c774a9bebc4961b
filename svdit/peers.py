"""The processes of one run under torchrun: the first failure is reported once, and nobody waits for one that is gone.

Every process counts upwards in the run's store, however long its work is, and watches the count of the next one.
"""

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import NoReturn

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from svdit import restarts
from svdit.files import remove_unfinished
from svdit.printing import write_error

INTERVAL = 2.0  # seconds between two looks
# Looks at the same count until a process counts as frozen: 40 s, so that all end within a minute. Work in C releases
# the interpreter's lock, and with it the count, so only a stalled disk or network keeps a working process silent.
FROZEN = 20
ABSENT = 300  # looks until a process counts as never started: on a slow disk, imports take minutes
PATIENCE = 3.0  # seconds in which a process ends by itself, or torchrun ends it, after another one failed
POLL = 0.05
TOGETHER = 10.0  # seconds in which all end; torchrun terminates the others when the first one exits
REPORT = 30.0  # seconds that a failed process has to print its message, while it still cleans up


def missing() -> list[str]:
    """The variables that processes need to find each other and that are not set."""
    return [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]


def processes() -> int:
    """The number of processes of the run, also before they have joined."""
    return 1 if missing() else int(os.environ.get("WORLD_SIZE", "1"))


def connect(wait: float = TOGETHER) -> Store:
    """A connection to the run's store, which torchrun has, or else the first process.

    Raises RuntimeError where nothing answers within `wait` seconds.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not restarts.shares_store() and os.environ["RANK"] == "0":
        serve(address, port)
    await_server(address, port, wait)
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=TOGETHER))
    return PrefixStore(f"svdit/{restarts.done()}" if restarts.shares_store() else "svdit", store)


@cache
def serve(address: str, port: int) -> Store:
    """The store, in this process until it ends. Raises RuntimeError if the port is in use."""
    return TCPStore(address, port, is_master=True, wait_for_workers=False, multi_tenant=True)


def await_server(address: str, port: int, wait: float) -> None:
    """Return when the port accepts connections. A TCPStore prints stack traces where one does not."""
    end = time.monotonic() + wait
    while True:
        try:
            return socket.create_connection((address, port), TOGETHER).close()
        except OSError as error:
            if time.monotonic() >= end:
                raise RuntimeError(f"no TCPStore at {address}:{port}: {error.strerror or error}") from None
            time.sleep(POLL)


@cache
def _reports() -> Store | None:
    with suppress(RuntimeError):
        return connect()
    return None


def _add(key: str, n: int) -> int | None:
    """The run's counter `key` after adding n; None where the store is gone."""
    with suppress(RuntimeError):
        if store := _reports():
            return store.add(key, n)
    return None


def first_to_fail() -> bool:
    """Whether no process of the run has failed before this one, which fails now. One per host, without a store."""
    return processes() == 1 or _first_of_several()


@cache
def _first_of_several() -> bool:
    failed = _add("failed", 1)
    return first_of_host() if failed is None else failed == 1


def first_of_host() -> bool:
    """Whether this is the first process on its host."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def await_termination() -> None:
    """After a lost connection: where a host joins or leaves, torchrun ends this process too, and nothing has failed."""
    if restarts.left():
        time.sleep(PATIENCE)


def report(line: str) -> None:
    """Print the line, unless another process has failed before."""
    if first_to_fail():
        write_error(line)
        if processes() > 1:
            _add("reported", 1)


def fail(line: str) -> NoReturn:
    """Print the line, unless another process has failed before, and exit with code 2, together with the others."""
    terminated = threading.Event()
    with suppress(ValueError):  # in the main thread: at the first exit torchrun ends the others
        signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    report(line)
    if processes() > 1:
        _add("ending", 1)  # "failed" counts a process that may still be cleaning up
        end = time.monotonic() + TOGETHER
        while (_add("ending", 0) or processes()) < processes() and time.monotonic() < end:
            if terminated.wait(POLL):
                break
    exit_now()


def exit_now() -> NoReturn:
    """Exit with code 2, also from a thread, and before torchrun terminates what is still cleaning up."""
    remove_unfinished()
    os._exit(2)


class Watch(threading.Thread):
    """Ends this process when another one has failed, died or is frozen, even where it waits in a collective.

    So too where torchrun was killed: its processes would go on, beside those of its next start.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.unanswered = FROZEN - ABSENT  # looks since the store's last answer; the first one may be late

    def run(self) -> None:
        """Look until `done` is set."""
        if processes() > 1:  # in a thread: an operation on the store of a frozen process or a lost host never ends
            threading.Thread(target=self.look_at_others, daemon=True).start()
        while not self.done.wait(INTERVAL):
            self.unanswered += 1
            if restarts.orphaned():
                self.end("torchrun was killed; run the same command again")
            if processes() > 1 and self.unanswered >= FROZEN:
                self.end_without_store()

    def look_at_others(self) -> None:
        """Count upwards, and look at the count of the next process and at failures."""
        place = int(os.environ["RANK"])
        neighbour = (place + 1) % processes()
        last = silent = 0
        try:
            store = connect(wait=ABSENT * INTERVAL)
            store.set(f"host/{place}", socket.gethostname())
            while not self.done.wait(INTERVAL):
                self.add(store, f"alive/{place}", 1)
                count = self.add(store, f"alive/{neighbour}", 0)
                silent = silent + 1 if count == last else 0  # not by the clock: all may have been suspended
                last = count
                if self.add(store, "failed", 0):
                    self.await_report(store)
                    self.end("")
                if silent >= (FROZEN if count else ABSENT):
                    host = f" on {store.get(f'host/{neighbour}').decode()}" if count else ""
                    problem = f"process {neighbour} of {processes()}{host} does not respond"
                    self.end(f"{problem}; {restarts.again('end it')}")
        except RuntimeError:
            self.end_without_store()

    def add(self, store: Store, key: str, n: int) -> int:
        """The counter `key` after adding n: an answer of the store."""
        value = store.add(key, n)
        self.unanswered = 0
        return value

    def await_report(self, store: Store) -> None:
        """Wait until the process that failed has printed its message: when this one ends, torchrun ends that one."""
        end = time.monotonic() + REPORT
        while not self.add(store, "reported", 0) and not self.done.wait(POLL) and time.monotonic() < end:
            pass

    def end(self, problem: str) -> None:
        """End the process, unless it does so by itself; without a problem another process has reported it."""
        if self.done.wait(PATIENCE):
            return
        if problem:
            report(f"svdit: {problem}")
        exit_now()

    def end_without_store(self) -> None:
        """End the process, unless it does so by itself, with a message on each host."""
        if self.done.wait(PATIENCE):
            return
        if first_of_host():
            write_error(f"svdit: the first process of this run is gone; {restarts.again('see its messages')}")
        exit_now()
