"""The bar draws on a terminal only."""

import os
import pty
import sys

import pytest

from svdit.progress import COLUMNS, progress


@pytest.mark.parametrize("unit", COLUMNS)
def test_it_is_silent_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str], unit: str) -> None:
    with progress("sampling", unit=unit) as update:
        update(1, 2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("unit", "text"), [("", " 50%"), ("bytes", "1.0/2.0 kB")])
@pytest.mark.parametrize("shown", [True, False])
def test_it_draws_on_a_terminal_if_asked(monkeypatch: pytest.MonkeyPatch, unit: str, text: str, shown: bool) -> None:
    reader, terminal = pty.openpty()
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(terminal, "w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", file)
        with progress("sampling", shown, unit) as update:
            update(1000, 2000)
        file.write("end")
    drawn = ""
    while "end" not in drawn:  # one read may return a part
        drawn += os.read(reader, 1 << 16).decode()
    assert ("sampling" in drawn, text in drawn) == (shown, shown)
