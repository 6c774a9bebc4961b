"""The kernels in C as one shared library: the installed one, or compiled at first use into the user's cache.

It holds every instruction set of this kind of processor; ffi.py chooses. A library is used only if it was compiled
from exactly the sources in csrc/. One in the cache is loaded only if its content has the hash in its name and nobody
else could have written it. SVDIT_KERNELS names another library instead (`make sanitize` does), CC another compiler.
"""

import ctypes
import os
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path

import torch  # before our library: it brings the OpenMP runtime that both use

from svdit.errors import UserError
from svdit.files import exclusive, sha256, temporary_folder, user_cache
from svdit.kernels.cpu.sources import FLAGS, OPENMP, files, source_hash
from svdit.printing import note, warn

WAIT = 120.0  # seconds for another process that compiles


class MissingKernelsError(Exception):
    """Why there is no library."""


def library() -> ctypes.CDLL:
    """The library. Raises MissingKernelsError, with the reason, where there is none."""
    result = _attempt()
    if isinstance(result, str):
        raise MissingKernelsError(result)
    return result


@cache
def _attempt() -> ctypes.CDLL | str:
    """The library or why there is none, so that a failing compiler runs only once per process."""
    try:
        return _find()
    except MissingKernelsError as error:
        return str(error)


def _find() -> ctypes.CDLL:
    torch.get_num_threads()
    before = openmp_runtimes()
    offer_openmp(before)
    override = os.environ.get("SVDIT_KERNELS")
    lib = _load(override) if override else _installed() or _load(_cached())
    if lib is None:
        path = override or "the compiled library"
        raise MissingKernelsError(f"{path} was not made from these sources; unset SVDIT_KERNELS")
    if before and openmp_runtimes() != before:
        raise MissingKernelsError(f"the kernels loaded a second OpenMP runtime beside torch's {', '.join(before)}")
    return lib


def openmp_runtimes() -> list[str]:
    """Files of OpenMP runtimes mapped into this process."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8", errors="replace").splitlines() if maps.exists() else []
    paths = {line.split()[-1] for line in lines if "omp" in line.rpartition("/")[2]}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))


def offer_openmp(runtimes: list[str]) -> None:
    """Let the library, which names no OpenMP runtime, find torch's, whose file has another name in some releases; the
    system's where torch has none. Raises MissingKernelsError where there is none at all."""
    root = Path(torch.__file__).parents[1]
    torchs = [
        path for path in runtimes if Path(path).is_relative_to(root) and path[len(str(root)) :].startswith("/torch")
    ]
    try:
        for path in OPENMP and (torchs or runtimes or ["libgomp.so.1"]):
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise MissingKernelsError(f"there is no OpenMP runtime ({error})") from error


def _load(path: str | Path) -> ctypes.CDLL | None:
    """The library at `path`, None if it was made from other sources."""
    try:
        check_whole(Path(path))
        lib = ctypes.CDLL(str(Path(path).absolute()))  # a name without a folder would be searched in the system's
        lib.svdit_source.restype = ctypes.c_char_p
        return lib if lib.svdit_source() == source_hash().encode() else None
    except (OSError, AttributeError, ValueError) as error:
        raise MissingKernelsError(f"{path} cannot be loaded ({error})") from error


def check_whole(path: Path) -> None:
    """Raises OSError for an ELF file that is shorter than its header says: the loader would end with SIGBUS."""
    if not path.is_file():
        raise OSError("it is not a file")
    with path.open("rb") as file:
        header = file.read(64).ljust(64, b"\0")
    if header[:5] == b"\x7fELF\x02":  # 64 bits; the table of sections is the last thing in the file
        offset, size, count = int.from_bytes(header[40:48], sys.byteorder), *struct.unpack("=HH", header[58:62])
        if offset + size * count > path.stat().st_size:
            raise OSError("it is truncated")


def _installed() -> ctypes.CDLL | None:
    for path in Path(__file__).parent.glob("_library*.so"):
        try:
            if lib := _load(path):
                return lib
        except MissingKernelsError as error:
            warn(f"{error}; install svdit again")
    return None


def _cached() -> Path:
    """The library in the cache, compiled if there is none; of several processes one compiles and the others wait."""
    folder = cache_folder()
    if path := _intact(folder):
        return path
    with ExitStack() as stack:
        with suppress(UserError):  # where the wait is over or the place has no locks, two compile
            stack.enter_context(exclusive(folder / "compiler", wait=WAIT))
        if path := _intact(folder):
            return path
        try:
            with temporary_folder(folder) as temporary:
                fresh = temporary / "kernels.so"
                compile_library(fresh)
                fresh.chmod(0o600)
                return fresh.replace(folder / f"{source_hash()}-{sha256(fresh)}.so")
        except OSError as error:
            raise MissingKernelsError(f"the kernels cannot be written into {folder} ({error})") from error


def _intact(folder: Path) -> Path | None:
    """A library in `folder` that only this user can have written and whose content has the hash in its name."""
    for path in sorted(folder.glob(f"{source_hash()}-*.so")):
        if is_ours(path) and path.stem.endswith(sha256(path)):
            return path
        warn(f"{path} is damaged or not your own and is compiled again")
        with suppress(OSError):
            path.unlink()
    return None


def cache_folder() -> Path:
    """This user's private folder for libraries: in the cache or, where that cannot be, among the temporary files."""
    cache = user_cache()
    temporary = Path(tempfile.gettempdir()) / f"svdit-kernels-{os.geteuid()}"
    for folder in (cache / "kernels", temporary):
        if folder.is_absolute() and _private(folder):
            if folder == temporary:
                note(f"{cache} cannot hold the compiled CPU kernels; they are in {folder}")
            return folder
    raise MissingKernelsError(f"neither {cache} nor {temporary} can hold the compiled library; set XDG_CACHE_HOME")


def _private(folder: Path) -> bool:
    """Whether the folder exists or can be created, and only this user can write into it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        return is_ours(folder) and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def is_ours(path: Path) -> bool:
    """Whether this user owns the file or folder, no link, and nobody else may write it."""
    status = path.lstat()
    mine = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return mine and (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode))


def compile_library(path: Path, extra: Sequence[str] = ()) -> None:
    """Compile the sources into `path`, with `extra` flags. Raises MissingKernelsError where that fails."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise MissingKernelsError("there is no C compiler (cc, gcc or clang); install one for fast inference")
    note(f"compiling the CPU kernels with {compiler}, once")
    define = f'-DSVDIT_SOURCE="{source_hash()}"'
    with tempfile.TemporaryDirectory() as folder:
        objects = [(source, Path(folder) / f"{Path(source).stem}.o") for source in files()]
        flags = [*compiler.split(), *FLAGS, *extra]
        if OPENMP and is_clang(compiler):
            note("the kernels use one thread: clang's OpenMP is not torch's; install gcc, and set CC if it is set")
            flags = [flag for flag in flags if flag not in OPENMP]
        _run([[*flags, define, "-c", source, "-o", str(made)] for source, made in objects])
        path.parent.mkdir(parents=True, exist_ok=True)
        linking = [flag for flag in flags if flag not in OPENMP]
        _run([[*linking, "-shared", *(str(made) for _, made in objects), "-lm", "-o", str(path)]])


def is_clang(compiler: str) -> bool:
    """Whether it is clang, whose OpenMP calls LLVM's runtime; torch for Linux brings GCC's."""
    try:
        command = [*compiler.split(), "-dM", "-E", "-x", "c", os.devnull]
        return "__clang__" in subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return False


def _run(commands: list[list[str]]) -> None:
    """Run all commands in parallel."""
    try:
        running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    except OSError as error:
        raise MissingKernelsError(f"{commands[0][0]} cannot be run ({error})") from error
    messages = [process.communicate()[1] for process in running]
    for process, message in zip(running, messages, strict=True):
        if process.returncode:
            raise MissingKernelsError(f"the kernels did not compile:\n{message.strip()[-2000:]}")
