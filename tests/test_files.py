"""Locks: one process per output, none left behind by a killed one, and no dependence on the file system.

Temporary files: private, unpredictable, and deleted by the next process on the same place, but not while in use.
"""

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svdit import files, images
from svdit.checkpoints import io as checkpoints
from svdit.errors import UserError
from svdit.evaluation.statistics import save_statistics
from svdit.files import atomic_path, exclusive, reading
from svdit.storage import npz

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
    assert {path.name for path in tmp_path.rglob("*")} <= {"set", "link"}  # no lock files


def test_whoever_waits_gets_the_lock(tmp_path: Path) -> None:
    first, acquired = holder(tmp_path / "cache"), threading.Event()

    def wait() -> None:
        with exclusive(tmp_path / "cache", wait=60):
            acquired.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not acquired.wait(0.2)
    assert first.stdin
    first.stdin.close()
    thread.join()
    assert acquired.is_set()
    first.wait()


@pytest.mark.parametrize(("restarts", "seconds"), [("0", 0), ("3", files.RESTARTING)])
def test_where_torchrun_restarts_processes_they_wait_for_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: str, seconds: float
) -> None:
    waits: list[float] = []

    def locked(place: Path, wait: float) -> AbstractContextManager[None]:
        waits.append(wait)
        return nullcontext()

    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setattr(files, "_locked", locked)
    with exclusive(tmp_path / "set"), exclusive(tmp_path / "cache", wait=7):
        pass
    assert waits == [seconds, 7]


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
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"cannot lock .*file/\.set\.lock .*; choose another"),
        exclusive(tmp_path / "file" / "set"),
    ):
        pass


def test_whoever_may_write_into_the_folder_may_lock(tmp_path: Path) -> None:
    """A killed job of another user leaves its lock, which must not shut out those who share the folder."""
    tmp_path.chmod(0o775)
    before = os.umask(0o077)
    try:
        with exclusive(tmp_path / "set"):
            assert (tmp_path / ".set.lock").stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(before)


def test_a_lock_that_cannot_be_opened_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / ".set.lock").mkdir()
    with (
        pytest.raises(
            UserError, match=r"cannot lock .*set\.lock \(.*\); delete it if no process is writing .*/set, or"
        ),
        exclusive(tmp_path / "set"),
    ):
        pass


def test_links_to_one_file_share_its_lock_and_stay_links(tmp_path: Path) -> None:
    link, dangling, real = tmp_path / "link", tmp_path / "dangling", tmp_path / "folder" / "real"
    real.parent.mkdir()
    real.touch()
    link.symlink_to(real)
    dangling.symlink_to(real.with_name("new"))
    with exclusive(link), pytest.raises(UserError, match="another process is writing"), exclusive(real):
        pass
    for path in (link, dangling):
        with atomic_path(path) as temporary:
            temporary.write_text("x")
        assert path.is_symlink()
        assert path.resolve().read_text() == "x"
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "link", "dangling", "real", "new"}


WRITE = """
import os, sys
from svdit.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print(temporary, flush=True)
    sys.stdin.read()
"""


def writer(path: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that has written half of `path`, and its temporary file."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def test_a_lock_on_a_deleted_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two others sweep the new folder: one deletes the file with the lock, the other makes a new one."""
    genuine, swept = fcntl.flock, list[Path]()

    def flock(lock: int, how: int) -> None:
        if not swept:
            swept.append(next(tmp_path.iterdir()))
            (swept[0] / files.LOCK).unlink()
            (swept[0] / files.LOCK).touch()
        genuine(lock, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    folder, lock = files.locked_folder(tmp_path)
    os.close(lock)
    assert folder != swept[0]


def test_the_next_process_deletes_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".svdit-of-the-user.tmp").write_text("a file")
    (tmp_path / ".other-123.tmp").mkdir()
    kept = set(tmp_path.iterdir())
    (tmp_path / ".svdit-456.tmp").mkdir()  # of one that was killed before it had its lock
    (killed, stray), (alive, used) = writer(tmp_path / "a.bin"), writer(tmp_path / "b.bin")
    killed.kill()
    killed.wait()
    assert stray.exists() and not (tmp_path / "a.bin").exists()
    third, _ = writer(tmp_path / "a.bin")
    third.communicate("")
    assert not stray.parent.exists() and used.exists()
    alive.communicate("")
    assert set(tmp_path.iterdir()) - kept == {tmp_path / "a.bin", tmp_path / "b.bin"}
    assert kept < set(tmp_path.iterdir())


def test_a_folder_is_removed_with_what_killed_processes_left_and_kept_with_anything_else(tmp_path: Path) -> None:
    ours, others = tmp_path / "ours", tmp_path / "others"
    for folder in (ours, others):
        (folder / ".svdit-456.tmp").mkdir(parents=True)
    (others / ".DS_Store").touch()
    for folder in (ours, others, tmp_path / "none"):
        files.remove_empty(folder)
    assert [*tmp_path.rglob("*")] == [others, others / ".DS_Store"]


def test_temporary_names_are_unpredictable_private_and_short(tmp_path: Path) -> None:
    """Nobody can place a symbolic link under the name; a file whose own name just fits can be written."""
    path = tmp_path / ("n" * 251 + ".bin")
    folders = []
    for _ in range(2):
        with atomic_path(path) as temporary:
            folders.append(temporary.parent)
            assert temporary.parent.stat().st_mode & 0o777 == 0o700
            temporary.write_text("x")
    assert folders[0] != folders[1]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o022, 0o027])
@pytest.mark.parametrize(
    "write", [lambda path: save_file({}, path), lambda path: path.write_text("x")], ids=["safetensors", "text"]
)
def test_files_have_the_permissions_of_the_umask(tmp_path: Path, umask: int, write: Callable[[Path], object]) -> None:
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "a.safetensors") as temporary:
            write(temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.fixture
def file_limit() -> Iterator[None]:
    """No file may grow beyond 4096 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


NOISE = torch.randn(100, 100, 3)
WRITERS: dict[str, Callable[[Path], object]] = {
    "a.safetensors": lambda path: checkpoints.write(path, {"x": NOISE}, {}),
    "a.pt": lambda path: checkpoints.write(path, {"x": NOISE}, {}),
    "a.png": lambda path: images.write_png(path, images.to_uint8(NOISE.permute(2, 0, 1)[None])[0]),
    "a.npz": lambda path: npz.write_npz(path, images.to_uint8(NOISE.permute(2, 0, 1)[None]), 1),
    "stats.npz": lambda path: save_statistics(path, {}, "x", features=NOISE.numpy()),
}


@pytest.mark.usefixtures("file_limit")
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_a_sentence_and_the_old_file_stays(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("old")
    with pytest.raises(UserError) as raised:
        WRITERS[name](path)
    assert str(raised.value) == (
        f"cannot write {path} (File too large); raise the limit (ulimit -f), or choose another file system"
    )
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def places(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    return {
        "File exists.*where a folder belongs": tmp_path / "file" / "a.bin",
        "Not a directory": tmp_path / "file" / "folder" / "a.bin",
        "it exists and is no file.; ": tmp_path / "folder",
        "it exists and is no file.; choose": tmp_path / "fifo",
        "File name too long": tmp_path / ("n" * 300),
        "File exists|Too many levels": tmp_path / "loop" / "a.bin",
        "Permission denied|Read-only file system|No such file": Path("/proc/a.bin"),
    }


def test_every_path_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    for reason, path in places(tmp_path).items():
        with pytest.raises(UserError, match=reason) as raised, atomic_path(path) as temporary:
            temporary.write_text("x")
        assert str(raised.value).startswith(f"cannot write {path} (")
        assert "); " in str(raised.value)


def test_errors_of_other_files_and_bugs_pass(tmp_path: Path) -> None:
    for error in (FileNotFoundError(2, "No such file", "/other"), KeyError("bug"), UserError("a sentence")):
        with pytest.raises(type(error)) as raised, atomic_path(tmp_path / "a.bin"):
            raise error
        assert raised.value is error


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_reading_blames_the_system_not_the_content(code: int) -> None:
    with pytest.raises(UserError, match=f"cannot read x \\({os.strerror(code)}\\); "), reading("x"):
        raise OSError(code, os.strerror(code))
    with pytest.raises(OSError, match="broken data stream"), reading("x"):
        raise OSError("broken data stream")
