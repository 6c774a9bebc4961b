"""Atomic writes (to a temporary file, then rename), locks, SHA-256 of files, and a check that a folder is writable.

`writing` and `reading` turn errors of the system into sentences with the path.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Literal, Protocol

from filelock import FileLock, Timeout

from svdit import restarts
from svdit.errors import LESS_MEMORY, REMEDIES, UnreadableError, UserError, failed, out_of_memory, system_error
from svdit.printing import note

PREFIX, SUFFIX, LOCK = ".svdit-", ".tmp", ".lock"  # of temporary folders, and of the file in it that is locked
RESTARTING = 60.0  # seconds; torchrun kills a process 30 s after asking it to end
swept, unfinished = set[Path](), set[Path]()  # folders where this process has looked for strays; its temporary ones
CANNOT_LOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # of file systems without locks


class Openable(Protocol):
    """A `Path`, or a file in an archive; as text, its name."""

    def open(self, mode: Literal["rb"], /) -> IO[bytes]:
        """The content."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path on the same disk: renamed to `path` on success, deleted on any exception.

    Where `path` is a link, its target is written. Raises UserError where the system cannot write the file, or `path`
    is a folder or a device.
    """
    path = Path(os.path.realpath(path) if os.path.islink(path) else path)  # noqa: PTH114, as Path's method can raise
    with writing(path):
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path} (it exists and is no file); choose the name of a file")
        with temporary_folder(path.parent) as folder:
            temporary = folder / path.name
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # as the umask says; safetensors creates files that only their owner can read
            temporary.replace(path)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A private folder for unfinished files, deleted at the end; those of killed processes are deleted before."""
    parent.mkdir(parents=True, exist_ok=True)
    if parent not in swept:
        swept.add(parent)
        sweep(parent)
    folder, lock = locked_folder(parent)
    unfinished.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.discard(folder)
        os.close(lock)


def locked_folder(parent: Path) -> tuple[Path, int]:
    """A new folder with an unpredictable name, and the descriptor that holds its lock as long as the process lives."""
    while True:
        folder = Path(tempfile.mkdtemp(SUFFIX, PREFIX, parent))
        with suppress(FileNotFoundError):  # where another process swept it before it was locked
            lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR)
            with suppress(OSError):  # file systems without locks are never swept
                fcntl.flock(lock, fcntl.LOCK_EX)
            if is_open_as(lock, folder / LOCK):
                return folder, lock
            os.close(lock)


def is_open_as(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of that name: a lock on a deleted file excludes nobody."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def sweep(parent: Path) -> None:
    """Delete the temporary folders in `parent` that no living process holds the lock of."""
    for folder in parent.glob(f"{PREFIX}*{SUFFIX}"):
        with suppress(OSError):
            # One killed as it made or deleted the folder left no lock there.
            lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


def remove_empty(folder: Path) -> None:
    """Delete the folder, with what killed processes left in it; one that holds anything else stays."""
    sweep(folder)
    with suppress(OSError):
        folder.rmdir()


def remove_unfinished() -> None:
    """Delete this process's temporary folders, before it ends without unwinding the stack."""
    for folder in list(unfinished):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Raise UserError where the system cannot write `path`; torch and safetensors have other types for this."""
    path = Path(path)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        system = next(filter(None, map(system_error, chain_of(error))), None)
        place = system and system.filename and Path(os.fsdecode(system.filename))
        if system is None or (place and place not in (path, *path.parents) and PREFIX not in str(place)):
            raise
        raise UserError(failed("write", path, system)) from None


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those before it: torch.save and zipfile replace the system's by their own."""
    while error:
        yield error
        error = error.__context__


@contextmanager
def reading(path: str | Openable) -> Iterator[None]:
    """Raise UnreadableError where the system cannot read `path`; errors about its content pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise UnreadableError(f"not enough memory to read {path}; {LESS_MEMORY}") from None
        system = next(filter(None, map(system_error, chain_of(error))), None)
        if system is None or system.errno not in REMEDIES:
            raise
        raise UnreadableError(failed("read", path, system)) from None


@contextmanager
def exclusive(*outputs: str | Path, wait: float | None = None) -> Iterator[None]:
    """Hold the locks of `outputs`, files or existing folders. The system releases them when the process is killed.

    A lock is an empty hidden file in the folder or beside the file. Raises UserError, naming the output, where another
    process holds one for `wait` seconds; None: 0, or, where torchrun restarts processes, until those before have ended
    on their hosts. Without locks on the file system a note is printed instead.
    """
    wait = (RESTARTING if restarts.allowed() else 0) if wait is None else wait
    with ExitStack() as locks:
        for path in map(Path, outputs):
            real = Path(os.path.realpath(path))
            place = real / ".lock" if real.is_dir() else real.with_name(f".{real.name}.lock")
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # newer versions of filelock have a substitute, and warn of it
                    locks.enter_context(_locked(place, wait))
            except Timeout:
                raise UserError(
                    f"another process is writing {path}; wait for it to finish, or choose another name"
                ) from None
            except (OSError, NotImplementedError) as error:
                if isinstance(error, OSError) and error.errno not in CANNOT_LOCK:
                    remedy = f"delete it if no process is writing {path}, or " if os.access(place, os.F_OK) else ""
                    raise UserError(f"cannot lock {place} ({error.strerror}); {remedy}choose another output") from None
                note(f"no locks on this file system; let no other process write {path}")
                with suppress(OSError):
                    place.unlink()
        yield


@contextmanager
def _locked(place: Path, wait: float) -> Iterator[None]:
    """Hold the lock of an open file of that name, which everybody may open who may write into the folder."""
    lock = FileLock(place, mode=0o600 | place.parent.stat().st_mode & 0o066)
    lock.acquire(timeout=wait)
    while not place.exists():  # its holder removed it after it was opened here
        lock.release()
        lock.acquire(timeout=wait)
    try:
        yield
    finally:
        with suppress(OSError):
            place.unlink()
        lock.release()


def to_disk(path: str | Path) -> None:
    """Wait until the file is on the disk, before what it was made from is deleted."""
    with Path(path).open("rb") as file:
        os.fsync(file.fileno())


def sha256(file: str | Openable) -> str:
    """Hex SHA-256 of a file's content, read in chunks."""
    digest = hashlib.sha256()
    with reading(file), (Path(file) if isinstance(file, str) else file).open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_expansion(path: str | Openable, unpacked: int, stored: int) -> None:
    """Raises UserError where `stored` bytes of a file declare to be more than 64 MiB and 200 times as many."""
    if unpacked > max(1 << 26, 200 * stored):
        raise UserError(f"{path} declares {unpacked / 1e6:.0f} MB in {stored} bytes; remove or replace it")


def check_zip(path: str | Path) -> None:
    """Read every member of a zip file (.npz, .pt). Raises BadZipFile where one does not match its checksum."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} does not match its checksum")


def writable_folder(path: str | Path) -> Path:
    """Create the folder if it is missing. Raises UserError, before any long computation, if it is not writable."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return Path(path)
    except OSError as error:
        raise UserError(failed("write into the folder", path, error)) from None


def user_cache() -> Path:
    """This user's folder for what can be made again, in $XDG_CACHE_HOME or ~/.cache; not absolute without a home."""
    xdg, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")  # noqa: PTH111, which can raise
    return Path(xdg if xdg.startswith("/") else home) / "svdit"


def creatable_folder(path: str | Path) -> None:
    """Raises UserError unless the folder is writable or can be created; creates nothing."""
    path = Path(path)
    writable_folder(next(place for place in (path, *path.absolute().parents) if place.exists()))
