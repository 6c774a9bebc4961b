"""Progress on stderr: a bar on a terminal; elsewhere, as in the log file of a job, one line a minute.

    generating: 1024 of 50000 images (2.0 %), 3.4/s, 4 h 0 min left

The rate is the mean from the second update on, which leaves out the work of earlier runs and the first step's warm-up.
A recent window would follow changes of speed, but is empty where one step takes longer. The lines are printed from a
thread: a sampling step on a CPU, or waiting for other processes, may take many minutes.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from svdit.printing import is_quiet, printable, write_error

T = TypeVar("T")
Update = Callable[[float, float | None], None]
PERIOD = 60.0  # seconds from one line to the next


class Task:
    """How much of a task is done, and how fast; printed as text."""

    def __init__(self, description: str, unit: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self.description, self.unit, self.clock = description, unit, clock
        self.started = clock()
        self.total: float | None = None
        self.updates: list[tuple[float, float]] = []  # time and amount of the first two and of the last

    def update(self, done: float, total: float | None) -> None:
        """`done` of `total` units are done, earlier runs included; a total of None is unknown."""
        self.total = total
        self.updates[2:] = [(self.clock(), done)]

    @property
    def rate(self) -> float:
        """Units per second; 0 if unknown, and once all are done."""
        if len(self.updates) < 3:
            return 0.0
        _, (start, before), (now, done) = self.updates
        return (done - before) / (now - start) if now > start and done != self.total else 0.0

    def amount(self) -> str:
        """ "1024 of 50000 images", for example."""
        of_total = "" if self.total is None else f" of {int(self.total)}"
        return f"{self.description}: {int(self.updates[-1][1])}{of_total} {self.unit}".rstrip()

    def __str__(self) -> str:
        if not self.updates:
            return self.description
        done, total, rate = self.updates[-1][1], self.total, self.rate
        share = f" ({100 * done / total:.1f} %)" if total else ""
        speed = f", {frequency(rate)}" if rate > 0 else ""
        left = f", {duration((total - done) / rate)} left" if total and rate > 0 else ""
        return f"{self.amount()}{share}{speed}{left}"

    def summary(self) -> str:
        """What was done in which time."""
        return f"{self.amount()} in {duration(self.clock() - self.started)}"


def frequency(rate: float) -> str:
    """A rate per second, or where that is small per minute or hour."""
    for factor, unit in ((1, "s"), (60, "min")):
        if rate * factor >= 0.1:
            return f"{rate * factor:.1f}/{unit}"
    return f"{rate * 3600:.1f}/h"


def duration(seconds: float) -> str:
    """ "40 s", "5 min" or "4 h 5 min"."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def progress(description: str, shown: bool = True, unit: str = "") -> Iterator[Update]:
    """Yield `update(done, total)`, which counts in `unit`; a total of None is unknown."""
    task, console = Task(printable(description), unit), Console(stderr=True)
    if is_quiet() or not shown:
        yield lambda done, total: None
    elif console.is_terminal:
        columns = BarColumn(10), TextColumn("{task.fields[text]}", markup=False)
        with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
            number = bar.add_task("", total=None, text=task)

            def update(done: float, total: float | None) -> None:
                task.update(done, total)
                bar.update(number, completed=done, total=total)

            yield update
    else:
        with lines(task):
            yield task.update


def counted(items: Iterable[T], total: int, update: Update) -> Iterator[T]:
    """The items; `update` counts those that have been used."""
    update(0, total)
    for done, item in enumerate(items, 1):
        yield item
        update(done, total)


@contextmanager
def lines(task: Task) -> Iterator[None]:
    """Print the task once in PERIOD, and a summary if it took longer than that."""
    ended, printed = threading.Event(), threading.Event()
    thread = threading.Thread(target=report, args=(task, ended, printed), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if printed.is_set():
            write_error(task.summary())


def report(task: Task, ended: threading.Event, printed: threading.Event) -> None:
    """Print the task after every PERIOD from its first update on, until it has ended."""
    while not ended.wait(PERIOD):
        if task.updates:
            write_error(task)
            printed.set()
