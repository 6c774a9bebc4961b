"""Locks: one process per output, none left behind by a killed one, and no dependence on the file system."""

import errno
import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from svdit.errors import UserError
from svdit.files import exclusive

HOLD = """
import sys
from svdit.files import exclusive
with exclusive(*sys.argv[1:]):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(*outputs: Path) -> subprocess.Popen[str]:
    """A process that holds the locks of `outputs`."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", HOLD, *map(str, outputs)], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_the_second_process_is_refused_until_the_first_is_killed(tmp_path: Path, kind: str) -> None:
    output, link = tmp_path / "set", tmp_path / "link"
    link.symlink_to(tmp_path)
    if kind == "folder":
        output.mkdir()
    first = holder(tmp_path / "another", output)
    for name in (output, link / "set", tmp_path / "missing" / ".." / "set"):
        with pytest.raises(UserError, match=f"another process is writing {name}; wait"), exclusive(name):
            pass
    with exclusive(tmp_path / "third"):
        pass
    first.send_signal(signal.SIGKILL)
    first.wait()
    with exclusive(output, tmp_path / "another"):
        pass
    visible = {path.name for path in tmp_path.rglob("*") if not path.name.startswith(".")}
    assert visible <= {"set", "link", "missing"}


def test_whoever_waits_gets_the_lock(tmp_path: Path) -> None:
    first = holder(tmp_path / "cache")
    assert first.stdin
    first.stdin.close()
    with exclusive(tmp_path / "cache", wait=60):
        pass
    first.wait()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks_are_used_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive(tmp_path / "set"):
        pass
    # filelock may have a substitute for the first of them
    assert code == errno.ENOSYS or "no locks on this file system; let no other process write" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"cannot create .*file/\.set\.lock .*; choose another"),
        exclusive(tmp_path / "file" / "set"),
    ):
        pass
