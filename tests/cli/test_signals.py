"""SIGTERM, SIGHUP and Ctrl-C leave no temporary file and no traceback; the exit code is 128 + signal.

So it is inside C and in a destructor.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from svdit.cli import command, inspect, signals
from svdit.files import atomic_path


def wait_in_python() -> None:
    time.sleep(60)


def wait_in_c() -> None:
    """Lock a mutex twice: signals do not end this, like a collective that waits for another process."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def wait_in_a_destructor() -> None:
    """Python drops what is raised there."""

    class Last:
        def __del__(self) -> None:
            wait_in_python()

    Last()
    wait_in_python()


def child(folder: Path, wait: Callable[[], None], ignore: int | None) -> None:
    """A command that waits in the middle of writing a file."""

    def run(args: object) -> None:
        with atomic_path(folder / "out") as temporary:
            temporary.write_text("half")
            (folder / "started").touch()
            wait()

    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr, sys.unraisablehook = os.fdopen(2, "w"), sys.__unraisablehook__  # pytest has its own
    signals.GRACE = 0.5 if wait is wait_in_c else 60
    inspect.run = run
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if ignore:
        signal.signal(ignore, signal.SIG_IGN)
    command("inspect", ["digits"])


def stopped(
    folder: Path, *numbers: int, wait: Callable[[], None] = wait_in_python, ignore: int | None = None
) -> int | None:
    """The exit code of such a command after these signals."""
    process = multiprocessing.get_context("fork").Process(target=child, args=(folder, wait, ignore))
    process.start()
    while not (folder / "started").exists():
        time.sleep(0.02)
    time.sleep(0.1)
    for number in numbers:
        os.kill(process.pid or 0, number)
        time.sleep(0.1)
    process.join(20)
    process.kill()
    return process.exitcode


@pytest.mark.parametrize("wait", [wait_in_python, wait_in_c, wait_in_a_destructor])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_command_and_leaves_nothing(
    number: signal.Signals, wait: Callable[[], None], tmp_path: Path
) -> None:
    assert stopped(tmp_path, number, wait=wait) == 128 + number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["started", "stderr"]
    assert (tmp_path / "stderr").read_text() == ""


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """`nohup svdit …`"""
    assert stopped(tmp_path, signal.SIGHUP, signal.SIGTERM, ignore=signal.SIGHUP) == 128 + signal.SIGTERM


def test_handlers_are_restored(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    command("inspect", ["digits"])
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


@pytest.mark.parametrize("error", [SystemExit(1), SystemExit("text"), ValueError("text")])
def test_other_errors_in_a_destructor_are_reported_as_ever(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Raises:
        def __del__(self) -> None:
            raise error

    reported = list[object]()
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: reported.append(dropped.exc_value))
    with signals.ending():
        Raises()
    assert reported == [error]
