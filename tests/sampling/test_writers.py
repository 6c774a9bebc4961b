"""Threads that store batches: bounded, complete at the end, and their errors are raised."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from svdit.images import Pixels
from svdit.sampling.writers import THREADS, Writers

BATCH = np.zeros((1, 1, 1, 3), np.uint8)


def test_everything_is_written_at_the_end() -> None:
    written: list[int] = []
    with Writers(lambda indices, pixels: written.extend(indices)) as writers:
        for i in range(50):
            writers.submit([i], BATCH)
    assert sorted(written) == list(range(50))


def test_what_waits_is_bounded() -> None:
    most, resume, submitted = 2 * THREADS, threading.Event(), threading.Semaphore(0)

    def submit_all() -> None:
        with Writers(lambda indices, pixels: resume.wait(60) and None) as writers:
            for i in range(most + 2):
                writers.submit([i], BATCH)
                submitted.release()

    thread = threading.Thread(target=submit_all)
    thread.start()
    assert all(submitted.acquire(timeout=60) for _ in range(most))
    assert not submitted.acquire(timeout=0.2), "one more batch would be in memory"
    resume.set()
    assert all(submitted.acquire(timeout=60) for _ in range(2))
    thread.join()


def submit(writers: Writers, batches: int, error: type[BaseException] | None = None) -> None:
    with writers:
        for i in range(batches):
            writers.submit([i], BATCH)
        if error is not None:
            raise error


@pytest.mark.parametrize("batches", [1, 20])
def test_an_error_is_raised(batches: int) -> None:
    def write(indices: Sequence[int], pixels: Pixels) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        submit(Writers(write), batches)


def test_an_interruption_keeps_what_was_submitted() -> None:
    written: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        submit(Writers(lambda indices, pixels: written.extend(indices)), 2, KeyboardInterrupt)
    assert sorted(written) == [0, 1]
