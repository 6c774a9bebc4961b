"""Atomic writes (to a temporary file, then rename), locks, SHA-256 of files, and a check that a folder is writable."""

import errno
import hashlib
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from svdit.errors import UserError
from svdit.printing import write_error

CANNOT_LOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # of file systems without locks


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder: renamed to `path` on success, deleted on any exception."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def exclusive(*outputs: str | Path, wait: float = 0) -> Iterator[None]:
    """Hold the locks of `outputs`, files or existing folders. The system releases them when the process is killed.

    A lock is an empty hidden file in the folder or beside the file, which stays. Raises UserError, naming the output,
    where another process holds one for `wait` seconds. Without locks on the file system a note is printed instead.
    """
    with ExitStack() as locks:
        for path in map(Path, outputs):
            folder = path.resolve()
            place = folder / ".lock" if folder.is_dir() else path.parent.resolve() / f".{path.name}.lock"
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # newer versions of filelock have a substitute, and warn of it
                    locks.enter_context(FileLock(place).acquire(timeout=wait))
            except Timeout:
                raise UserError(
                    f"another process is writing {path}; wait for it to finish, or choose another name"
                ) from None
            except (OSError, NotImplementedError) as error:
                if isinstance(error, OSError) and error.errno not in CANNOT_LOCK:
                    raise UserError(f"cannot create {place} ({error.strerror}); choose another output") from None
                write_error(f"note: no locks on this file system; let no other process write {path}")
        yield


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's content, read in chunks."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_expansion(path: str | Path, unpacked: int, stored: int) -> None:
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
        raise UserError(f"cannot write into the folder {path} ({error.strerror}); choose another one") from None
