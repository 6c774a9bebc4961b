"""A progress bar on stderr; silent where stderr is no terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from svdit.printing import printable

COLUMNS = {"": (TaskProgressColumn,), "bytes": (DownloadColumn, TransferSpeedColumn)}


@contextmanager
def progress(description: str, shown: bool = True, unit: str = "") -> Iterator[Callable[[float, float | None], None]]:
    """Yield `update(done, total)`; a total of None is unknown. `unit`: "bytes" shows sizes and speed, "" per cent."""
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda done, total: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *(column() for column in COLUMNS[unit]),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(printable(description), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
