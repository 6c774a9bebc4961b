"""A bar on a terminal; in a log one line a minute, whose rate is that of this run."""

import os
import pty
import queue
import re
import sys
import threading
from collections.abc import Iterator

import pytest

from svdit import progress as module
from svdit.progress import Task, counted, duration, frequency, progress


def task(*updates: tuple[float, float], total: float | None, unit: str = "images") -> Task:
    """A task with updates at the given times, started at 0."""
    times: Iterator[float] = iter([0.0, *(time for time, _ in updates), 14_700.0])
    made = Task("generating", unit, clock=lambda: next(times))
    for _, done in updates:
        made.update(done, total)
    return made


@pytest.mark.parametrize(
    ("updates", "total", "text"),
    [
        ([], None, "generating"),
        ([(5, 0)], 50_000, "generating: 0 of 50000 images (0.0 %)"),
        ([(9, 1024.9)], 50_000, "generating: 1024 of 50000 images (2.0 %)"),
        ([(0, 0), (10, 4), (20, 38)], 50_000, "generating: 38 of 50000 images (0.1 %), 3.4/s, 4 h 5 min left"),
        ([(0, 0), (60, 4), (70, 10), (80, 24)], 64, "generating: 24 of 64 images (37.5 %), 1.0/s, 40 s left"),
        ([(0, 3000), (90, 3001), (100, 3011)], 3611, "generating: 3011 of 3611 images (83.4 %), 1.0/s, 10 min left"),
        ([(0, 10), (1, 20), (2, 30)], None, "generating: 30 images, 10.0/s"),
        ([(0, 10), (1, 10), (9, 10)], 20, "generating: 10 of 20 images (50.0 %)"),
        ([(0, 0), (1, 0), (9, 0)], 0, "generating: 0 of 0 images"),
        ([(0, 1), (1, 2), (2, 4)], 4, "generating: 4 of 4 images (100.0 %)"),
        ([(0, 1), (0, 2), (0, 3)], 4, "generating: 3 of 4 images (75.0 %)"),
    ],
)  # fmt: skip
def test_the_text_has_what_is_done_the_rate_and_the_time_left(
    updates: list[tuple[float, float]], total: float | None, text: str
) -> None:
    """Neither images of an earlier run count, nor the first step, which is slow."""
    assert str(task(*updates, total=total)) == text


def test_the_summary_has_the_time_of_the_whole_task() -> None:
    assert task((1, 50_000.0), total=50_000).summary() == "generating: 50000 of 50000 images in 4 h 5 min"
    assert task((1, 7), total=None, unit="").summary() == "generating: 7 in 4 h 5 min"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.5, "1 min"), (3569, "59 min"), (3571, "1 h 0 min"), (360_060, "100 h 1 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(1234.5, "1234.5/s"), (0.1, "0.1/s"), (0.09, "5.4/min"), (1 / 3600, "1.0/h")]
)
def test_frequencies(rate: float, text: str) -> None:
    assert frequency(rate) == text


def test_a_short_task_is_silent_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("sampling") as update:
        update(1, 2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("shown", [True, False])
def test_a_long_one_prints_lines_and_a_summary_if_asked(monkeypatch: pytest.MonkeyPatch, shown: bool) -> None:
    lines: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(module, "PERIOD", 0.001)
    monkeypatch.setattr(module, "write_error", lambda line: lines.put(str(line)))
    with progress("sampling\n", shown, "steps") as update:
        update(1.5, 2)
        printed = [lines.get(timeout=60) for _ in range(2 * shown)]  # also without another update
        update(2, 2)
    printed += [lines.get_nowait() for _ in range(lines.qsize())]
    assert printed[:2] == ["sampling\\n: 1 of 2 steps (75.0 %)"] * 2 * shown
    assert printed[-1:] == ["sampling\\n: 2 of 2 steps in 0 s"] * shown


def test_nothing_is_printed_before_the_first_update(capsys: pytest.CaptureFixture[str]) -> None:
    class Minutes(threading.Event):
        """Ends in the third minute, with the first update in the second."""

        passed = 0

        def wait(self, timeout: float | None = None) -> bool:
            assert timeout == 60
            self.passed += 1
            if self.passed == 2:
                made.update(1, 2)
            return self.passed == 3

    made, printed = Task("sampling"), threading.Event()
    module.report(made, Minutes(), printed)
    assert capsys.readouterr() == ("", "sampling: 1 of 2 (50.0 %)\n")
    assert printed.is_set()


@pytest.mark.parametrize(("shown", "colours"), [(True, True), (True, False), (False, True)])
def test_it_draws_on_a_terminal_if_asked(monkeypatch: pytest.MonkeyPatch, shown: bool, colours: bool) -> None:
    reader, terminal = pty.openpty()
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(terminal, "w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", file)
        with progress("sampling [b]", shown, "steps") as update, progress("decoding", shown) as inner:
            update(1000, 2000)
            inner(1, 4)
        file.write("end")
    drawn = ""
    while "end" not in drawn:  # one read may return a part
        drawn += os.read(reader, 1 << 16).decode()
    texts = "sampling [b]: 1000 of 2000 steps (50.0 %)", "decoding: 1 of 4 (25.0 %)"
    assert [text in drawn for text in texts] == [shown, shown]
    assert bool(re.search(r"\x1b\[[0-9;]*[39][0-9]m", drawn)) == (shown and colours)


def test_items_are_counted_when_they_have_been_used() -> None:
    seen: list[tuple[float, float | None]] = []
    for item in counted("ab", 2, lambda done, total: seen.append((done, total))):
        assert seen[-1] == ("ab".index(item), 2)
    assert seen == [(0, 2), (1, 2), (2, 2)]
