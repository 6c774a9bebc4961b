"""SIGTERM and SIGHUP end a command as Ctrl-C does: the stack unwinds, so temporary files are deleted.

Python delays a signal until the main thread returns from C, which it does not do while it waits for other processes.
A thread ends the process then. Python also drops what is raised in a destructor or in the callback of a weak reference;
the signal is sent again then.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
GRACE = 5.0  # seconds that the main thread has


@contextmanager
def ending() -> Iterator[None]:
    """Exit with code 128 + signal; signals that are ignored stay so (nohup)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, unwind)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=force, args=(reader,), daemon=True).start()
    unraisable = sys.unraisablehook
    sys.unraisablehook = lambda dropped: resend(dropped, unraisable)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        sys.unraisablehook = unraisable
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        writer.close()


def unwind(number: int, frame: FrameType | None) -> None:
    """Exit by an exception, once."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def resend(dropped: Any, otherwise: Callable[[Any], object]) -> None:
    """Send a signal again whose exception Python has dropped (a `sys.UnraisableHookArgs`)."""
    error = dropped.exc_value
    codes = {128 + number: number for number in SIGNALS}
    if isinstance(error, SystemExit) and error.code in codes:
        number = codes[error.code]
        signal.signal(number, unwind)
    elif isinstance(error, KeyboardInterrupt):
        number = signal.SIGINT
    else:
        otherwise(dropped)
        return
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()  # after this hook, which drops exceptions too


def force(reader: socket.socket) -> None:
    """End the process when the main thread has not done so GRACE seconds after a signal."""
    from svdit.files import remove_unfinished

    with reader:
        code = 0
        try:
            while received := reader.recv(1):
                if received[0] in (*SIGNALS, signal.SIGINT):
                    code = 128 + received[0]
                    reader.settimeout(GRACE)
        except TimeoutError:
            remove_unfinished()
            os._exit(code)
